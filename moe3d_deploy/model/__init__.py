"""The PyTorch reference: VGGT with the MoE3D expert head, weight-compatible with VGGT."""

from moe3d_deploy.model.moe3d import MoE3D

__all__ = ["MoE3D"]
