"""How good a prediction is: depth, boundaries, flying points, point clouds, cameras, gate. NumPy and SciPy, no torch.

Definitions and sources: docs/metrics.md.
"""

from moe3d_deploy.metrics.boundary import BoundaryScore, boundary_f1, edge_miou
from moe3d_deploy.metrics.depth import DepthErrors, align_median, depth_errors
from moe3d_deploy.metrics.flying import flying_point_ratio
from moe3d_deploy.metrics.gate import GateStatistics, gate_statistics
from moe3d_deploy.metrics.normals import normals_from_points
from moe3d_deploy.metrics.points import CloudErrors, IcpResult, Similarity, cloud_errors, icp, umeyama
from moe3d_deploy.metrics.pose import PoseErrors, auc, relative_pose_errors
from moe3d_deploy.metrics.scene import scene_quality

__all__ = [
    "BoundaryScore",
    "CloudErrors",
    "DepthErrors",
    "GateStatistics",
    "IcpResult",
    "PoseErrors",
    "Similarity",
    "align_median",
    "auc",
    "boundary_f1",
    "cloud_errors",
    "depth_errors",
    "edge_miou",
    "flying_point_ratio",
    "gate_statistics",
    "icp",
    "normals_from_points",
    "relative_pose_errors",
    "scene_quality",
    "umeyama",
]
