"""Activation memory: how many bytes of tensors are alive at once while a model runs. Weights are not part of it.

The tensors that a run makes and lets go are written down in order (memory_eager, memory_compiled), then counted the
way their allocator does. Nothing here runs a model or needs torch.
"""

from moe3d_deploy.config import ModelConfig
from moe3d_deploy.costs import Sizes
from moe3d_deploy.errors import InputError
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.manifest import SPLITS
from moe3d_deploy.memory_compiled import record_compiled
from moe3d_deploy.memory_eager import record_eager

FORMS = ("eager", "fused", "explicit")
_ROLES = tuple(role for split in SPLITS.values() for role in split)


def activation_bytes(
    config: ModelConfig,
    shape: tuple[int, int, int, int],
    *,
    form: str,
    precision: str = "fp32",
    view_chunk: int | None = None,
    part: str | None = None,
) -> int:
    """Peak bytes of the tensors alive at once, for depth and cameras of images of `shape` (B, S, H, W).

    form        "eager": the PyTorch model in float32 with fused attention; the sum of the live tensors.
                "fused": an engine with fused attention, built for a range of shapes of which `shape` is the largest;
                such an engine reserves a block for every tensor alive at once, each as large as the largest tensor
                that it ever holds.
                "explicit": the same engine with the attention's weights in memory, (heads, T, T) for each view and
                (heads, S T, S T) for each scene: TensorRT-RTX in float32.
                Both count the experts merged, and no point head.
    precision   of the weights and of what is computed with them; "eager" is float32 only
    view_chunk  "eager" only: views that the dense heads take at a time
    part        engines only: role of a part of a split model, run on all of `shape` at once; what it takes and gives is
                the caller's memory, see memory_split

    Raises InputError for a combination that does not exist.
    """
    if form not in FORMS:
        raise InputError(f"form {form!r} is unknown; choose from {', '.join(FORMS)}")
    policy = PrecisionPolicy(precision)
    if form == "eager" and precision != "fp32":
        raise InputError(f"form 'eager' is float32 only, not {precision}; choose fp32, or form 'fused'")
    if form != "eager" and view_chunk is not None:
        raise InputError(f"form {form!r} runs all views at once; leave view_chunk out, or choose form 'eager'")
    if form == "eager" and part is not None:
        raise InputError(f"form 'eager' is PyTorch, which runs whole models and no part {part!r}: choose another form")
    if part not in (None, *_ROLES):
        raise InputError(f"part {part!r} is unknown; choose from {', '.join(_ROLES)}")
    if view_chunk is not None and view_chunk < 1:
        raise InputError(f"view_chunk must be at least 1, got {view_chunk}")
    sizes = Sizes.of(config, shape)
    if form == "eager":
        return record_eager(sizes, view_chunk).peak()
    return record_compiled(sizes, policy.type_of, fused=form == "fused", part=part).blocks()
