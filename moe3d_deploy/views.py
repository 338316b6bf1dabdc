"""Whatever a user has (files, folders, patterns, videos, animated images, standard input) as the views of scenes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

from moe3d_deploy.errors import InputError
from moe3d_deploy.frame_choice import FrameChoice, spaced
from moe3d_deploy.image_decode import count_frames, decode_frames, decode_image, image_suffixes
from moe3d_deploy.image_files import VIDEO_SUFFIXES, PathLike, as_list, expand, read_file, read_stream, shown
from moe3d_deploy.images import Exif, Fitting, ImageBatch, Mode, Prepared, batch_of, fit
from moe3d_deploy.video import is_video, video_views

STDIN = "-"


@dataclass(frozen=True, eq=False)
class Views:
    """What inputs gave: a batch per scene, and lines for people on what was chosen and how it was grouped."""

    batches: tuple[ImageBatch, ...]
    notes: tuple[str, ...]


def load_views(
    inputs: PathLike | Sequence[PathLike],
    *,
    mode: Mode = "crop",
    size: int = 518,
    patch_size: int = 14,
    exif: Exif = "apply",
    group_by_size: bool = False,
    stride: int | None = None,
    start: int = 0,
    max_views: int | None = None,
    all_frames: bool = False,
    stdin: BinaryIO | None = None,
) -> Views:
    """Read inputs as the views of one scene, or of one scene per size, in the order given.

    inputs         image files, videos, folders and patterns; "-" is one image from the binary stream `stdin`.
                   A folder or pattern gives its images, or its videos where it has no image (`image_files.find_images`)
    mode ... exif  as `images.load_images` takes them; exif "apply" also turns a video as it says
    group_by_size  False: one batch, smaller views padded with white. True: a batch for every network size, in the
                   order in which the sizes first appear, nothing padded but what `mode` pads
    stride, start  every stride-th frame of each video from `start`; without a stride evenly spaced ones, at most 32
    max_views      at most so many views in all. Videos share what single images leave of it; without a video, that many
                   of the images, evenly spaced
    all_frames     animated images and multi-page files are sequences like videos; otherwise their first frame is used

    Returns batches whose `images` are (S, 3, H, W) float32 RGB in [0, 1]. Frames are named clip.mp4#000120.
    A video that ends early, a damaged one and an animated image of which one frame is used give a Moe3dWarning.
    Raises InputError, with the name, for an input that cannot be read, is no image or video, or does not fit together.
    """
    fitting = Fitting(mode, size, patch_size, exif)
    choice = FrameChoice(stride, start, max_views)
    sources, notes = _share([_source(item, all_frames, stdin) for item in find_inputs(inputs)], choice)
    prepared: list[Prepared] = []
    for source, chosen in sources:
        views, more = source.read(chosen, fitting)
        prepared += views
        notes += more
    if not group_by_size:
        return Views((batch_of(prepared),), tuple(notes))
    groups: dict[tuple[int, ...], list[Prepared]] = {}
    for pixels, view in prepared:
        groups.setdefault(pixels.shape, []).append((pixels, view))
    batches = tuple(batch_of(group) for group in groups.values())
    if len(batches) > 1:
        sizes = ", ".join(f"{scene_size(batch)} ({_counted(len(batch.views), 'view')})" for batch in batches)
        notes.append(f"{len(batches)} scenes, one per size: {sizes}; each has a world frame and a scale of its own")
    return Views(batches, tuple(notes))


def find_inputs(inputs: PathLike | Sequence[PathLike]) -> list[str | Path]:
    """The files that `inputs` of `load_views` name, in its order; "-" stays what it is. Opens none of them.

    Raises InputError as `image_files.find_images` does, and for "-" given twice.
    """
    found: list[str | Path] = []
    for item in as_list(inputs):
        found += [STDIN] if item == STDIN else expand(item, image_suffixes(), VIDEO_SUFFIXES)
    if not found:
        raise InputError("no images given; name at least one image, video, folder or pattern")
    if found.count(STDIN) > 1:
        raise InputError(f'"{STDIN}" is given {found.count(STDIN)} times; standard input holds one image: name it once')
    return found


def scene_size(batch: ImageBatch) -> str:
    """The network size of a batch as <width>x<height>."""
    return f"{batch.images.shape[3]}x{batch.images.shape[2]}"


class _Source(Protocol):
    """One input: a single picture, or a sequence of which some frames are chosen."""

    @property
    def is_sequence(self) -> bool: ...

    def read(self, choice: FrameChoice, fitting: Fitting) -> tuple[list[Prepared], list[str]]:
        """Its views, and notes on what was chosen."""


@dataclass(frozen=True)
class _Picture:
    """An image file, or the bytes of one. `name` is the view's, `label` what errors call it."""

    name: str
    label: str
    path: Path | None
    data: bytes = b""
    is_sequence = False

    def bytes(self) -> bytes:
        return self.data if self.path is None else read_file(self.path, self.label)

    def read(self, choice: FrameChoice, fitting: Fitting) -> tuple[list[Prepared], list[str]]:
        image = decode_image(self.bytes(), self.label, fitting.exif)
        return [fit(image, self.name, self.label, fitting)], []


@dataclass(frozen=True)
class _Animation:
    """The frames or pages of one image file."""

    picture: _Picture
    count: int
    is_sequence = True

    def read(self, choice: FrameChoice, fitting: Fitting) -> tuple[list[Prepared], list[str]]:
        name, label = self.picture.name, self.picture.label
        numbers = choice.numbers(self.count)
        if not numbers:
            raise InputError(f"{label} has {self.count} frames; start at 0 to {self.count - 1}, not {choice.start}")
        frames = zip(numbers, decode_frames(self.picture.bytes(), label, numbers, fitting.exif), strict=True)
        views = [fit(frame, f"{name}#{number:06d}", f"{label} frame {number}", fitting) for number, frame in frames]
        return views, [choice.note(name, numbers, self.count)]


@dataclass(frozen=True)
class _Video:
    path: Path
    is_sequence = True

    def read(self, choice: FrameChoice, fitting: Fitting) -> tuple[list[Prepared], list[str]]:
        views, note = video_views(self.path, choice, fitting)
        return views, [note]


def _source(item: str | Path, all_frames: bool, stdin: BinaryIO | None) -> _Source:
    if isinstance(item, Path):
        suffix = item.suffix.lower()
        if suffix in VIDEO_SUFFIXES or (suffix not in image_suffixes() and is_video(item)):
            return _Video(item)
        picture = _Picture(shown(item.name), f'image "{shown(item)}"', item)
    else:
        if stdin is None or stdin.isatty():
            raise InputError(f'"{STDIN}" reads an image from standard input, but nothing is piped in; name a file')
        label = "image from standard input"
        picture = _Picture("stdin", label, None, read_stream(stdin, label))
    count = count_frames(picture.bytes(), picture.label) if all_frames else 1
    return _Animation(picture, count) if count > 1 else picture


def _share(sources: list[_Source], choice: FrameChoice) -> tuple[list[tuple[_Source, FrameChoice]], list[str]]:
    """The sources that are used, each with its choice of frames, and notes. `max_views` is shared out here."""
    sequences = sum(source.is_sequence for source in sources)
    images = len(sources) - sequences
    if not sequences and (choice.stride is not None or choice.start):
        raise InputError("a stride or a start is for videos (and animated images with --all-frames); none is given")
    most = choice.max_views
    if most is None:
        return [(source, choice) for source in sources], []
    if not sequences:
        kept = spaced(sources, most)
        notes = [f"{len(kept)} of {images} images, evenly spaced"] if len(kept) < images else []
        return [(source, choice) for source in kept], notes
    room = most - images
    if room < sequences:
        given = f"{_counted(images, 'image')} and {_counted(sequences, 'video')}"
        raise InputError(f"{given} do not fit in {_counted(most, 'view')}; raise --max-views or name fewer")
    shares = iter([room // sequences + (i < room % sequences) for i in range(sequences)])
    return [(source, replace(choice, max_views=next(shares) if source.is_sequence else 1)) for source in sources], []


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
