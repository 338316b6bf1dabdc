"""The input side of `moe3d run`: its options, and IMAGES as one or several scenes."""

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moe3d_deploy.errors import InputError, Moe3dWarning

if TYPE_CHECKING:
    from moe3d_deploy.images import ImageBatch
    from moe3d_deploy.manifest import Preprocessing
    from moe3d_deploy.runtime.session import Session
    from moe3d_deploy.views import Views

_Command = TypeVar("_Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--max-views",
        type=click.IntRange(min=1),
        help="At most so many views in all, evenly spaced; default: all images, 32 frames of a video.",
    ),
    click.option("--frame-stride", type=click.IntRange(min=1), help="Every so many frames of a video."),
    click.option("--start", type=click.IntRange(min=0), default=0, help="First frame of a video, counted from 0."),
    click.option("--all-frames", is_flag=True, help="Frames and pages of animated images too, as those of a video."),
    click.option(
        "--group-by-size",
        is_flag=True,
        help="A scene for every view size, in OUT/<width>x<height>, instead of padding all to one.",
    ),
)


def input_options(command: _Command) -> _Command:
    """Add the options that choose views, as the keyword arguments of `read_views`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_views(
    inputs: Sequence[str | Path],
    preprocessing: "Preprocessing",
    *,
    mode: str | None,
    size: int | None,
    exif: str,
    max_views: int | None,
    frame_stride: int | None,
    start: int,
    all_frames: bool,
    group_by_size: bool,
) -> "Views":
    """The views of the inputs, fitted as a model wants them unless `mode` and `size` say otherwise."""
    from moe3d_deploy.views import load_views

    with _readers_warnings():
        return load_views(
            inputs,
            mode=mode or preprocessing.mode,  # type: ignore[arg-type]
            size=size or preprocessing.size,
            patch_size=preprocessing.patch_size,
            exif=exif,  # type: ignore[arg-type]
            group_by_size=group_by_size,
            stride=frame_stride,
            start=start,
            max_views=max_views,
            all_frames=all_frames,
            stdin=None if sys.stdin is None else sys.stdin.buffer,
        )


def scene_folders(views: "Views", output: Path, group_by_size: bool) -> list[tuple["ImageBatch", Path]]:
    """Each scene and the folder of its files: OUT, or a folder in it per size."""
    from moe3d_deploy.views import scene_size

    return [(batch, output / scene_size(batch) if group_by_size else output) for batch in views.batches]


def check_scenes(session: "Session", scenes: Sequence[tuple["ImageBatch", Path]]) -> None:
    """Raise InputError for a scene that the session cannot take; of several, it is named."""
    for batch, folder in scenes:
        try:
            session.check(batch.images)
        except InputError as error:
            raise InputError(f"{folder.name}: {error}" if len(scenes) > 1 else str(error)) from error


def remove_other_scenes(output: Path, folders: Sequence[Path]) -> None:
    """Remove what earlier runs into OUT left in it and its folders per size, but for `folders`, which got a new scene.

    A folder that is named like a size, but was the OUT of a run itself, stays as it is.
    """
    from moe3d_deploy.runtime.output_folder import is_grouped_scene, remove_earlier_scene, write_errors

    with write_errors(output):
        sizes = [entry for entry in output.iterdir() if re.fullmatch(r"[0-9]+x[0-9]+", entry.name) and entry.is_dir()]
        for folder in {output, *filter(is_grouped_scene, sizes)} - set(folders):
            remove_earlier_scene(folder)
            if folder != output and not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def _readers_warnings() -> Iterator[None]:
    """Warnings of Pillow in the block become lines as ours are. That an image is large is none: there is a limit."""
    from PIL.Image import DecompressionBombWarning

    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for warning in caught:
            if issubclass(warning.category, Moe3dWarning):
                warnings.warn(warning.message, stacklevel=2)
            elif issubclass(warning.category, UserWarning):
                warnings.warn(f"an image may be damaged: {warning.message}", Moe3dWarning, stacklevel=2)
            elif not issubclass(warning.category, DecompressionBombWarning):
                warnings.warn(warning.message, stacklevel=2)
