"""A scene as a Rerun recording. The one module that imports rerun.

scene/points           Points3D
scene/views/000        Transform3D: the camera's pose
scene/views/000/image  Pinhole and the network's input image
scene/views/000/image/depth       DepthImage, 0 where it is invalid
scene/views/000/image/confidence  the same of the confidence
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moe3d_deploy.errors import Moe3dError, first_line, require
from moe3d_deploy.files import atomic_write
from moe3d_deploy.images import ImageBatch
from moe3d_deploy.runtime.pointcloud import PointCloud

APPLICATION = "moe3d"
ROOT = "scene"


def require_rerun() -> None:
    """Raise MissingExtraError unless rerun is installed; imports nothing."""
    require("rerun")


def write_recording(
    result: Mapping[str, np.ndarray], batch: ImageBatch, valid: np.ndarray, cloud: PointCloud, path: Path
) -> None:
    """Write the .rrd file of one scene; all in it is static, so it needs no timeline.

    result   depth, depth_conf (S, H, W), extrinsics (S, 3, 4), intrinsics (S, 3, 3)
    valid    (S, H, W) bool, where the depth counts
    cloud    the scene's points

    Rerun numbers rows by the clock, so two recordings of one scene differ in some bytes. It is recorded in memory and
    then written, because rerun's own file writer reports a full disk late or, at its end, waits for ever.
    Raises MissingExtraError, Moe3dError where rerun cannot record, or OSError.
    """
    require_rerun()
    import rerun as rr

    # Without properties, which would put the time of day into the file.
    recording = rr.RecordingStream(APPLICATION, recording_id=path.stem, send_properties=False)
    if not rr.is_enabled(recording):
        raise Moe3dError(f"{path}: rerun recorded nothing; unset the variable RERUN or leave rrd out of the formats")
    memory = recording.memory_recording()

    def log(entity: str, *what: rr.AsComponents) -> None:
        recording.log(entity, *what, static=True, strict=True)

    try:
        log(ROOT, rr.ViewCoordinates.RDF)
        log(f"{ROOT}/points", rr.Points3D(cloud.points, colors=cloud.colors))
        for index, view in enumerate(batch.views):
            rotation, translation = result["extrinsics"][index, :, :3], result["extrinsics"][index, :, 3]
            height, width = valid.shape[1:]
            name = f"{ROOT}/views/{index:03d}"
            log(
                name,
                rr.Transform3D(mat3x3=rotation, translation=translation, relation=rr.TransformRelation.ChildFromParent),
                rr.AnyValues(name=view.name),
            )
            log(
                f"{name}/image",
                rr.Pinhole(image_from_camera=result["intrinsics"][index], width=width, height=height),
                rr.Image(np.rint(batch.images[index].transpose(1, 2, 0) * 255).astype(np.uint8)),
            )
            for kind, key in (("depth", "depth"), ("confidence", "depth_conf")):
                shown = np.where(valid[index], result[key][index], 0).astype(np.float32)
                log(f"{name}/image/{kind}", rr.DepthImage(shown, meter=1.0))
        data = memory.drain_as_bytes()
    except (RuntimeError, TypeError, ValueError) as error:
        raise Moe3dError(f"{path}: rerun {rr.__version__} cannot record the scene: {first_line(error)}") from error
    atomic_write(path, data)
