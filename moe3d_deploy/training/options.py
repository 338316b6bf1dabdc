"""What a training run is asked to do: one frozen dataclass, its JSON form, and what may change when a run goes on.

Nothing here needs torch. The command line's flags are these fields (`cli.train`); docs/training.md explains them.
"""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe3d_deploy import strict_json
from moe3d_deploy.errors import CheckpointError, InputError
from moe3d_deploy.machine import usable_cores

TRAINED_PARTS = ("head", "backbone", "all")
AMP = ("off", "bf16", "bf16-heads")
OPTIMIZERS = ("adamw", "muon")
DEPTH_LOSSES = ("l2", "log", "nll", "vggt")
FEATURE_CACHES = ("auto", "memory", "disk", "off")
MOST_VIEWS = 8  # of a rendered scene
MOST_SCENES = 10_000_000

_ANY_TIME: dict[str, Any] = {"any_time": True}  # of a field that changes how a run goes, not what comes out of it


@dataclass(frozen=True)
class TrainOptions:
    """All of a run. A step sees `batch` scenes, whatever the number of micro-batches and processes they are split into.

    Raises InputError for a value that makes no sense.
    """

    source: str
    train: str = "head"  # "head": experts and gate alone; "backbone": all but the depth head; "all": every tensor
    from_scratch: bool = False  # torch's usual initialisation; of the source only the config counts
    seed: int = 0

    steps: int = 1000
    batch: int = 4  # scenes of a step
    accumulate: int = 1  # micro-batches of a step
    optimizer: str = "adamw"  # "muon": for the matrices of the transformer blocks, AdamW for the rest
    learning_rate: float = 5e-4  # the largest, after the warm-up
    warmup: int | None = None  # steps; None: a twentieth of all
    final_rate: float = 0.01  # of the last step, as a share of the largest
    weight_decay: float = 0.05  # of matrices; norms, biases and tokens have none
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.999  # decay of the average of the weights
    compile: bool = False  # the transformer blocks, by torch
    amp: str = "off"  # bfloat16 in the backbone; "bf16-heads": in the depth head too

    depth_loss: str = "l2"
    depth_weight: float = 1.0
    camera_weight: float = 1.0  # not used where the camera head is frozen
    entropy_weight: float = 0.0  # the paper's gate collapses from 1e-3 on
    gradient_weight: float = 1.0  # of "vggt" and "log": the gradient term beside the error
    point_weight: float = 0.0  # of the points that a patch's tokens tell, see `training.aids`
    match_weight: float = 0.0  # of the matches that attention finds
    temperature: tuple[float, float] | None = None  # of the gate, at the first and the last step; None: the source's

    shapes: tuple[tuple[int, int], ...] = ((126, 168),)  # (height, width) in pixels; one of them per step
    views: tuple[int, int] = (1, 4)  # fewest and most of a sample
    scenes: int | None = None  # distinct ones; None: 1,000 where samples repeat, else 100,000
    scene_views: int = MOST_VIEWS  # rendered per scene, of which a sample takes some
    photographs: bool = False
    camera_effects: bool = True
    mirror: bool = True
    jitter: bool = True
    feature_cache: str = "auto"  # "head" only; all but "off" repeat the samples of the first pass over the scenes

    scene_cache: str | None = field(default=None, metadata=_ANY_TIME)  # folder
    scene_cache_gb: float = field(default=20.0, metadata=_ANY_TIME)
    workers: int | None = field(default=None, metadata=_ANY_TIME)  # None: see `workers_for`
    device: str = field(default="auto", metadata=_ANY_TIME)
    save_every: int = field(default=500, metadata=_ANY_TIME)  # steps
    log_every: int = field(default=10, metadata=_ANY_TIME)
    validate_every: int = field(default=500, metadata=_ANY_TIME)  # 0: never
    validation_scenes: int = field(default=8, metadata=_ANY_TIME)
    licence: str | None = field(default=None, metadata=_ANY_TIME)  # of the weights; None: the source's
    minutes: float | None = field(default=None, metadata=_ANY_TIME)  # after which the run stops, to be resumed

    def __post_init__(self) -> None:
        _check(self)

    @property
    def scene_count(self) -> int:
        if self.scenes is not None:
            return self.scenes
        return 1000 if self.repeats_samples else 100_000

    @property
    def warmup_steps(self) -> int:
        return self.steps // 20 if self.warmup is None else self.warmup

    def workers_for(self, device: str, processes: int) -> int:
        """Processes that make samples for each of `processes` that train on this machine, on "cpu" or "cuda".

        Unless given, one where the CPU trains; where a GPU does, which takes more than one can make, all cores but one.
        """
        if self.workers is not None:
            return self.workers
        return 1 if device == "cpu" else max(1, (usable_cores() - 1) // processes)

    @property
    def repeats_samples(self) -> bool:
        """Whether the samples of the first pass over the scenes come again, so that their features can be kept."""
        return self.train == "head" and self.feature_cache != "off"

    @classmethod
    def from_dict(cls, values: Any) -> "TrainOptions":
        """Read the JSON form. Raises InputError for an unknown key or a value of the wrong type."""
        if not isinstance(values, dict):
            raise InputError(f"training options: expected an object, got {strict_json.show(values)}")
        hints = typing.get_type_hints(cls)
        if unknown := sorted(key for key in values if key not in hints):
            raise InputError(
                f"training options: unknown key {strict_json.show(unknown[0])}; known are {', '.join(hints)}"
            )
        if "source" not in values:
            raise InputError("training options: 'source' is missing; name a preset or a checkpoint")
        return cls(**{key: _convert(hints[key], value, key) for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `from_dict` of it gives equal options."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "TrainOptions":
        """Read an options.json. Raises CheckpointError for a file that is none, OSError."""
        try:
            return cls.from_dict(strict_json.parse(path.read_bytes()))
        except (strict_json.JsonError, InputError) as error:
            raise CheckpointError(f"{path}: {error}; it is not this version's, choose another folder") from error

    def first_difference(self, other: "TrainOptions") -> str | None:
        """The first field in which a run with `other` would give other weights: its name; None where it would not."""
        for entry in dataclasses.fields(self):
            if not entry.metadata.get("any_time") and getattr(self, entry.name) != getattr(other, entry.name):
                return entry.name
        return None


def _convert(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, (list, tuple)) or (items[-1] is not ... and len(value) != len(items)):
            raise InputError(f"training options: {where}: expected a list, got {strict_json.show(value)}")
        kinds = [items[0]] * len(value) if items[-1] is ... else items
        return tuple(_convert(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise InputError(f"training options: {where}: expected {hint.__name__}, got {strict_json.show(value)}")
    return value


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


_POSITIVE = ("steps", "batch", "accumulate", "learning_rate", "clip", "save_every", "log_every")
_NOT_NEGATIVE = (
    "seed", "final_rate", "weight_decay", "depth_weight", "camera_weight", "entropy_weight", "gradient_weight",
    "point_weight", "match_weight", "scene_cache_gb", "workers", "validate_every",
)  # fmt: skip
_CHOICES = {
    "train": TRAINED_PARTS, "optimizer": OPTIMIZERS, "amp": AMP, "depth_loss": DEPTH_LOSSES,
    "feature_cache": FEATURE_CACHES,
}  # fmt: skip


def _check(o: TrainOptions) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise InputError(f"training options: {message}")

    for entry in dataclasses.fields(o):
        value = getattr(o, entry.name)
        if isinstance(value, float):
            require(math.isfinite(value), f"{entry.name} must be a finite number, got {value}")
    for name, choices in _CHOICES.items():
        require(getattr(o, name) in choices, f"{name} must be one of {', '.join(choices)}, got {getattr(o, name)!r}")
    for name in _POSITIVE:
        require(getattr(o, name) > 0, f"{name} must be positive, got {getattr(o, name)}")
    for name in _NOT_NEGATIVE:
        require((getattr(o, name) or 0) >= 0, f"{name} must not be negative, got {getattr(o, name)}")
    require(o.batch % o.accumulate == 0, f"batch {o.batch} cannot be split into {o.accumulate} equal micro-batches")
    require(0 <= o.ema < 1, f"ema must be in [0, 1), got {o.ema}")
    require(o.final_rate <= 1, f"final_rate is a share of the learning rate, at most 1, got {o.final_rate}")
    require(o.warmup is None or 0 <= o.warmup < o.steps, f"warmup must be in 0..{o.steps - 1}, got {o.warmup}")
    temperature = (1.0, 1.0) if o.temperature is None else o.temperature
    require(len(temperature) == 2 and all(t > 0 and math.isfinite(t) for t in temperature),
            f"temperature must be positive, got {':'.join(f'{t:g}' for t in temperature)}")  # fmt: skip
    require(bool(o.shapes), "shapes is empty; give at least one HEIGHTxWIDTH")
    for height, width in o.shapes:
        require(height > 0 and width > 0, f"shape {height}x{width} holds no pixel")
    require(1 <= o.scene_count <= MOST_SCENES, f"scenes must be in 1..{MOST_SCENES}, got {o.scenes}")
    require(1 <= o.scene_views <= MOST_VIEWS, f"scene_views must be in 1..{MOST_VIEWS}, got {o.scene_views}")
    least, most = o.views
    require(1 <= least <= most, f"views {least}:{most} must be from few to many, at least 1")
    require(most <= o.scene_views, f"views {least}:{most} needs more than the {o.scene_views} views of a scene")
    require(o.validation_scenes >= 1, f"validation_scenes must be positive, got {o.validation_scenes}")
    require(o.minutes is None or o.minutes > 0, f"minutes must be positive, got {o.minutes}")
    require(not (o.from_scratch and o.train == "head"),
            "a head on a backbone from scratch learns nothing that lasts; use --train all")  # fmt: skip
    require(not (o.train == "head" and (o.point_weight or o.match_weight)),
            "point_weight and match_weight teach the backbone, which stays as it is; use --train all")  # fmt: skip
    require(not (o.train != "all" and o.amp == "bf16-heads"),
            f"amp bf16-heads: --train {o.train} leaves the depth head's body alone; use bf16")  # fmt: skip
    require(not (o.train == "backbone" and not o.point_weight),
            "train backbone has no depth head to learn depth from; give it a point_weight, such as 0.5")  # fmt: skip
