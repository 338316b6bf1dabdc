"""The files of one scene: depth, colour maps, arrays, cameras and point clouds. It runs no model."""

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe3d_deploy.errors import InputError
from moe3d_deploy.images import ImageBatch, ViewMapping
from moe3d_deploy.runtime.cameras_file import cameras_json
from moe3d_deploy.runtime.colmap import DEFAULT_POINTS, MODEL_FOLDER, check_names, colmap_model, write_colmap
from moe3d_deploy.runtime.original import to_original
from moe3d_deploy.runtime.output_folder import CAMERAS_FILE, prepare_folder, staged_scene, write_errors
from moe3d_deploy.runtime.overview import MAX_ROWS, overview
from moe3d_deploy.runtime.point_files import require_points, write_glb, write_ply
from moe3d_deploy.runtime.pointcloud import PointCloud, check_scene, check_thinning, point_cloud, valid_pixels
from moe3d_deploy.runtime.rerun_log import require_rerun, write_recording
from moe3d_deploy.runtime.scene_maps import MAPS, TITLES, SceneScale, encode_png, photograph, pictures
from moe3d_deploy.runtime.thinning import VoxelSize

FORMATS = ("png", "npz", "ply", "glb", "colmap", "colmap-txt", "rrd")
DEFAULT_FORMATS = ("png", "npz", "ply", "glb")
_OF_POINTS = {"ply", "glb", "colmap", "colmap-txt", "rrd"}
_STEM_BYTES = 120  # leaves room for index, suffix and a temporary name below the 255 bytes of a file name


@dataclass(frozen=True)
class OutputOptions:
    """How the files of a scene are made; the defaults suit a few views.

    drop_lowest   share of the valid pixels, those of lowest confidence, left out of every point cloud
    voxel         one point per voxel of this size
    max_points    at most so many points; COLMAP models have 100,000 without it
    original      depth and confidence in the photographs' resolution too, as PNG and npz

    Raises InputError for a number out of range.
    """

    drop_lowest: float = 0.25
    voxel: VoxelSize | None = None
    max_points: int | None = None
    original: bool = False

    def __post_init__(self) -> None:
        check_thinning(self.drop_lowest, self.max_points)


def write_scene(
    result: Mapping[str, np.ndarray],
    batch: ImageBatch,
    folder: Path,
    *,
    formats: Sequence[str] = DEFAULT_FORMATS,
    options: OutputOptions = OutputOptions(),
    group_of: str | None = None,
) -> list[Path]:
    """Write one scene into `folder` (created if absent) and return its files, cameras.json last.

    result    one scene without the B axis: depth, depth_conf (S, H, W), extrinsics (S, 3, 4), intrinsics (S, 3, 3);
              optional expert_weights (S, K, H, W), expert_entropy (S, H, W); any other array goes into the npz only
    batch     the images the result belongs to: S views of the network size H x W
    formats   some of FORMATS; `cameras.json` is always written, and last: a folder that has it is complete
    group_of  of one scene per size the name of the folder that holds all of them, for cameras.json

    The files take the place of an earlier scene's all at once (`output_folder.staged_scene`); nothing else is touched.
    docs/outputs.md describes every file.

    png   per view <index>_<stem>_depth.png (16 bit, depth = value * depth_png_scale, 0 invalid), _depth_color.png
          (colours of 1 / depth: near is warm), _conf.png and, where the result has them, _experts.png and _entropy.png;
          one depth scale and one colour range for all views; padding is 0 or black; overview.png shows them together.
          65535 stands for 1.5 times the 99.9th percentile of the scene's depth, or its maximum where that is smaller;
          deeper pixels have 65535 too: `saturated_fraction` in cameras.json is their share of a view's valid ones
    npz   scene.npz with every array of the result, padding included
    ply, glb              points.ply, points.glb (see `point_cloud`)
    colmap, colmap-txt    a model in sparse/0, binary or text, of the photographs
    rrd                   scene.rrd, a Rerun recording (extra `viz`)

    Raises InputError for arrays that do not fit the batch, formats or options that do not go together, views that
    COLMAP cannot tell apart, a scene without a valid point where a GLB is asked for, or a folder that cannot be
    written; MissingExtraError. In all these cases the folder holds what it held before.
    """
    check_formats(formats, options)
    check_views(batch.views, formats)
    arrays = {name: np.asarray(value) for name, value in result.items()}
    views, _, height, width = batch.images.shape
    check_scene(arrays, views, height, width)
    _check_experts(arrays, views, height, width)
    scene = _Scene.of(arrays, batch)
    folder = Path(folder)
    prepare_folder(folder)
    with write_errors(folder):
        cloud = _cloud(scene, folder, formats, options)
        with staged_scene(folder) as staging:
            files = _write_files(scene, cloud, staging, formats, options, group_of)
    return [folder / name for name in files]


def check_formats(formats: Sequence[str], options: OutputOptions = OutputOptions()) -> None:
    """Find what stops `write_scene` whatever the images are: to be called before a model runs for minutes.

    Raises InputError for a format that it does not know or options that do not go with the formats, MissingExtraError.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise InputError(f"output format {unknown[0]!r} is unknown; choose from {', '.join(FORMATS)}")
    if options.original and not {"png", "npz"} & set(formats):
        raise InputError("depth in the original resolution is written as png and npz; add one of them to the formats")
    if (options.voxel or options.max_points) and not _OF_POINTS & set(formats):
        raise InputError(f"there are no points to thin; add one of {', '.join(sorted(_OF_POINTS))} to the formats")
    if "rrd" in formats:
        require_rerun()


def check_views(views: Sequence[ViewMapping], formats: Sequence[str]) -> None:
    """Find what stops `write_scene` with these photographs, before a model runs. Raises InputError."""
    if {"colmap", "colmap-txt"} & set(formats):
        check_names(views, text="colmap-txt" in formats)


@dataclass(frozen=True, eq=False)
class _Scene:
    """arrays by name; masks (S, H, W) bool, false on padding; valid (S, H, W) bool, where the depth counts."""

    arrays: dict[str, np.ndarray]
    batch: ImageBatch
    masks: np.ndarray
    valid: np.ndarray
    scale: SceneScale

    @staticmethod
    def of(arrays: dict[str, np.ndarray], batch: ImageBatch) -> "_Scene":
        height, width = batch.images.shape[2:]
        masks = np.stack([view.valid_mask(height, width) for view in batch.views])
        valid = valid_pixels(arrays["depth"], masks)
        return _Scene(arrays, batch, masks, valid, SceneScale.of(arrays, masks, valid))


def _cloud(scene: _Scene, folder: Path, formats: Sequence[str], options: OutputOptions) -> PointCloud | None:
    if not _OF_POINTS & set(formats):
        return None
    cloud = point_cloud(
        scene.arrays,
        scene.batch.images,
        scene.masks,
        drop_lowest=options.drop_lowest,
        voxel=options.voxel,
        max_points=options.max_points,
    )
    if "glb" in formats:
        require_points(cloud, folder / "points.glb")
    return cloud


def _write_files(
    scene: _Scene,
    cloud: PointCloud | None,
    folder: Path,
    formats: Sequence[str],
    options: OutputOptions,
    group_of: str | None,
) -> list[str]:
    """Write every file and return their names, relative to `folder`."""
    arrays, batch, names = scene.arrays, scene.batch, list[str]()
    if cloud is not None:
        names += _write_points(scene, cloud, folder, formats, options)
    if "npz" in formats:
        names.append("scene.npz")
        with open(folder / names[-1], "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    drawn: list[dict[str, str]] = [{} for _ in batch.views]
    if "png" in formats:
        _write_pictures(scene, folder, drawn)
    if options.original:
        names += _write_original(scene, folder, formats, drawn)
    names += [name for of_view in drawn for name in of_view.values()]
    if "png" in formats:
        names.append("overview.png")
    points = None if cloud is None else len(cloud)
    document = cameras_json(arrays, batch, scene.masks, scene.valid, scene.scale, drawn, names, points, group_of)
    (folder / CAMERAS_FILE).write_bytes(document)
    return [*names, CAMERAS_FILE]


def _write_points(
    scene: _Scene, cloud: PointCloud, folder: Path, formats: Sequence[str], options: OutputOptions
) -> list[str]:
    names = []
    for kind, write in (("glb", write_glb), ("ply", write_ply)):
        if kind in formats:
            names.append(f"points.{kind}")
            write(cloud, folder / names[-1])
    if "rrd" in formats:
        names.append("scene.rrd")
        write_recording(scene.arrays, scene.batch, scene.valid, cloud, folder / names[-1])
    forms = [name for name in ("colmap", "colmap-txt") if name in formats]
    if forms:
        few = cloud.limited(options.max_points or DEFAULT_POINTS)
        shape = scene.batch.images.shape[2:]
        model = colmap_model(few, scene.batch.views, scene.arrays["extrinsics"], scene.arrays["intrinsics"], shape)
        (folder / MODEL_FOLDER).mkdir(parents=True)
        for form in forms:
            paths = write_colmap(model, folder / MODEL_FOLDER, text=form == "colmap-txt")
            names += [f"{MODEL_FOLDER}/{path.name}" for path in paths]
    return names


def _write_pictures(scene: _Scene, folder: Path, drawn: list[dict[str, str]]) -> None:
    """Write each view's pictures and the overview; their names go into `drawn`, per view by kind."""
    rows = []
    for index, view in enumerate(scene.batch.views):
        of_view = {name: array[index] for name, array in scene.arrays.items() if name in MAPS}
        maps = pictures(of_view, scene.masks[index], scene.valid[index], scene.scale)
        if index < MAX_ROWS:
            titled = {title: maps[kind] for kind, title in TITLES.items() if kind in maps}
            rows.append({"photograph": photograph(scene.batch.images[index]), **titled})
        for kind, picture in maps.items():
            _write_picture(picture, folder, drawn[index], kind, index, view)
    (folder / "overview.png").write_bytes(encode_png(overview(rows), "overview.png"))


def _write_original(scene: _Scene, folder: Path, formats: Sequence[str], drawn: list[dict[str, str]]) -> list[str]:
    """Write depth and confidence in the photographs' resolution, one view in memory at a time; returns other names."""
    arrays = scene.arrays
    cameras = {
        "extrinsics": arrays["extrinsics"],
        "intrinsics": np.stack(
            [view.intrinsics_to_original(k) for view, k in zip(scene.batch.views, arrays["intrinsics"], strict=True)]
        ).astype(np.float32),
    }
    archive = None
    if "npz" in formats:
        archive = zipfile.ZipFile(folder / "scene_original.npz", "w")
        for name, array in cameras.items():
            _store(archive, name, array)
    try:
        for index, view in enumerate(scene.batch.views):
            maps = to_original(view, arrays["depth"][index], arrays["depth_conf"][index], scene.valid[index])
            if archive is not None:
                _store(archive, f"depth_{index:03d}", maps.depth)
                _store(archive, f"depth_conf_{index:03d}", maps.confidence)
            if "png" in formats:
                seen = np.isfinite(maps.depth)
                of_view = {"depth": maps.depth, "depth_conf": maps.confidence}
                for kind, picture in pictures(of_view, seen, seen, scene.scale).items():
                    _write_picture(picture, folder, drawn[index], f"original_{kind}", index, view)
    finally:
        if archive is not None:
            archive.close()
    return ["scene_original.npz"] if archive is not None else []


def _store(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, array)


def _write_picture(
    picture: np.ndarray, folder: Path, drawn: dict[str, str], kind: str, index: int, view: ViewMapping
) -> None:
    drawn[kind] = f"{index:03d}_{_stem(view.name)}_{kind}.png"
    (folder / drawn[kind]).write_bytes(encode_png(picture, drawn[kind]))


def _check_experts(arrays: dict[str, np.ndarray], views: int, height: int, width: int) -> None:
    for name, axes in (("expert_weights", "S, K, H, W"), ("expert_entropy", "S, H, W")):
        if name not in arrays:
            continue
        shape = arrays[name].shape
        if len(shape) != axes.count(",") + 1 or (shape[0], *shape[-2:]) != (views, height, width) or 0 in shape:
            raise InputError(f"{name} has shape {shape}, expected ({axes}) with S, H, W = {views}, {height}, {width}")


def _stem(name: str) -> str:
    """A view's name without folder and ending, with every character that some file system dislikes as "_".

    A frame keeps its number: clip.mp4#000120 is clip_000120.
    """
    frame = re.fullmatch(r"(.+)#([0-9]+)", name)
    plain = f"{Path(frame[1]).stem}_{frame[2]}" if frame else Path(name).stem
    stem = re.sub(r"[^\w.-]", "_", plain)
    return stem.encode("utf-8")[:_STEM_BYTES].decode("utf-8", "ignore")
