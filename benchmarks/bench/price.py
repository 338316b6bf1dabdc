"""What the experts add, as the report's section `price` has it: raw series of heads and models that ran in turns.

VGGT's single head and the forms of MoE3D's do the same to the same tokens. What follows from it: `price_figures`.
"""

from dataclasses import dataclass
from typing import Any

from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import BundleError, InputError
from moe3d_deploy.strict_fields import require

SINGLE = "single"  # VGGT's last stage
PLAIN = "plain"  # a branch for each expert, and the gate's
MERGED = "merged"  # one 3x3 convolution for all branches
FUNCTION = "function"  # that convolution and `moe3d::ExpertMix` with its body, as an export has it
KERNEL = "kernel"  # that convolution and the CUDA kernel
FORMS = (SINGLE, PLAIN, MERGED, FUNCTION, KERNEL)

HEAD = "head"  # tokens -> depth and confidence
MODEL = "model"  # images -> everything, in each form
BUNDLE = "bundle"  # the same of a bundle, in the one form that it has: a total for the heads beside it
PARTS = (HEAD, MODEL, BUNDLE)

TURN = "turn"  # of a turn's times: all forms, one after the other
MEASURED, FAILED = "measured", "failed"

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class PriceRound:
    """One process.

    series               milliseconds of every form, an entry for every turn
    activations_bytes    by form, the most that a run needs beside weights and inputs; None: nothing tells
    activations_by       "allocator", or "anonymous memory", which has workspaces in it
    before, after        the machine's state
    """

    seed: int
    device: str
    threads: int
    warmup_turns: int
    stable: bool
    series: dict[str, tuple[float, ...]]
    activations_bytes: dict[str, int | None]
    activations_by: str
    before: dict[str, Any]
    after: dict[str, Any]

    def __post_init__(self) -> None:
        require(bool(self.series), "series", "must not be empty")
        turns = len(next(iter(self.series.values())))
        for form, times in self.series.items():
            require(form in FORMS, f"series.{form}", f"must be one of {', '.join(FORMS)}")
            require(0 < len(times) == turns, f"series.{form}", "must have an entry of every turn")
            require(min(times) > 0, f"series.{form}", "must be positive")
        require(self.activations_bytes.keys() == self.series.keys(), "activations_bytes", "must have every form")


@dataclass(frozen=True)
class PriceCase:
    """Forms of one head on one shape (B, S, H, W) of images in one backend.

    part            HEAD, MODEL or BUNDLE
    single_flop     of the whole model with VGGT's head, without a point head; experts_flop: with the experts
    seeded_weights  part of the last stage is not the checkpoint's, which has no such experts
    missing         why a form is not among the series
    """

    backend: str
    precision: str
    part: str
    num_experts: int
    shape: Shape
    single_flop: int
    experts_flop: int
    seeded_weights: bool
    missing: dict[str, str]
    status: str
    reason: str | None
    rounds: tuple[PriceRound, ...]

    def __post_init__(self) -> None:
        require(self.part in PARTS, "part", f"must be one of {', '.join(PARTS)}")
        require(self.status in (MEASURED, FAILED), "status", f"must not be {self.status!r}")
        require((self.reason is None) == (self.status == MEASURED), "reason", "must be that of a case that failed")
        require(self.status == FAILED or bool(self.rounds), "rounds", "must not be empty")
        require(min(self.shape) > 0, "shape", "must be positive")
        require(min(self.single_flop, self.experts_flop) > 0, "single_flop, experts_flop", "must be positive")
        for i, item in enumerate(self.rounds):
            forms = set(item.series)
            whole = len(forms) == 1 if self.part == BUNDLE else SINGLE in forms and len(forms) > 1
            require(whole, f"rounds[{i}].series", "must have the single head and another form")

    @property
    def forms(self) -> tuple[str, ...]:
        """Those measured, in the order of FORMS."""
        return tuple(form for form in FORMS if self.rounds and form in self.rounds[0].series)

    @property
    def label(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.part} of {self.num_experts} experts, {self.backend} {self.precision} {shape}"


@dataclass(frozen=True)
class Price:
    """`config` is the checkpoint's; `options` those of the measurement."""

    model: str
    config: dict[str, Any]
    options: dict[str, Any]
    cases: tuple[PriceCase, ...]

    def __post_init__(self) -> None:
        try:
            ModelConfig.from_dict(self.config)
        except InputError as error:
            raise BundleError(f"config: {error}") from None
