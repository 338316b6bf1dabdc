"""What a scene is asked to be, and what comes back."""

from dataclasses import dataclass

from torch import Tensor

from moe3d_deploy.errors import InputError

SPLITS = ("train", "test-seeds", "test-kinds")

# Part of the key of every cache of scenes: another number wherever the same seed gives another scene.
GENERATOR_VERSION = 2

SMALLEST_SIDE = 8
LARGEST_SIDE = 4096
MOST_VIEWS = 8
MOST_SEEDS = 1 << 63


@dataclass(frozen=True)
class SceneOptions:
    """Size and content of a scene.

    height, width   pixels, 8..4096
    views           1..8 cameras
    split           "train"; "test-seeds": the same kinds of objects from other random streams; "test-kinds": kinds of
                    objects that the other two never show
    photographs     photographs on some surfaces, from scikit-image's data folder
    camera_effects  exposure, white balance, vignetting, noise and blur; they change the images alone

    Raises InputError for a value outside of these.
    """

    height: int = 126
    width: int = 168
    views: int = 4
    split: str = "train"
    photographs: bool = False
    camera_effects: bool = True

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            _whole_number(name, getattr(self, name), SMALLEST_SIDE, LARGEST_SIDE)
        _whole_number("views", self.views, 1, MOST_VIEWS)
        if self.split not in SPLITS:
            raise InputError(f"split {self.split!r} is unknown; choose one of {', '.join(SPLITS)}")


@dataclass(frozen=True)
class Scene:
    """A rendered scene: S views of H x W pixels, tensors on one device, lengths in scene units.

    images       (S, 3, H, W)  uint8 RGB
    depth        (S, H, W)     float32 along the optical axis; 0 where no surface was hit
    normals      (S, H, W, 3)  float32, unit length, world axes, towards the camera; 0 where depth is 0
    extrinsics   (S, 3, 4)     float32 camera from world, OpenCV axes; pixel centres lie at integer coordinates
    intrinsics   (S, 3, 3)     float32 pixels; cx = W/2, cy = H/2, fx = fy, the same for all views
    edges        (S, H, W)     bool, the near side of an occlusion: a 4-neighbour is farther by a ratio above 1.05, or
                               is sky, and belongs to another surface
    surfaces     (S, H, W)     int32, which surface was hit, the same number in all views; -1 for none
    kinds                      the kinds of objects in the scene, sorted
    """

    images: Tensor
    depth: Tensor
    normals: Tensor
    extrinsics: Tensor
    intrinsics: Tensor
    edges: Tensor
    surfaces: Tensor
    kinds: tuple[str, ...]
    seed: int


def check_seed(seed: int) -> None:
    """Raises InputError."""
    _whole_number("seed", seed, 0, MOST_SEEDS - 1)


def _whole_number(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"{name} is {value!r}; a scene takes a whole number in {least}..{most}")
