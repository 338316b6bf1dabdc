"""Memory of a model in two files, beside its weights: each part by itself, and what lies between the two.

The parts run one after the other and give back what they have used, so the peak is that of the part that needs the
most; the tokens of all views that go from one to the other are alive in both. Both parts are loaded all the while.
"""

from dataclasses import dataclass

from moe3d_deploy.config import ModelConfig
from moe3d_deploy.costs import BYTES, Shape4, Sizes
from moe3d_deploy.errors import InputError
from moe3d_deploy.manifest import PER_VIEW, SPLITS
from moe3d_deploy.memory import activation_bytes


@dataclass(frozen=True)
class PartMemory:
    """What one part takes.

    shape             (B, S, H, W) that it runs on at a time
    activation_bytes  of its own tensors, without what it takes and gives
    between_bytes     of the tokens between the parts, of all views
    """

    role: str
    shape: Shape4
    activation_bytes: int
    between_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.activation_bytes + self.between_bytes


def split_memory(
    config: ModelConfig, shape: Shape4, split: str, *, form: str, precision: str, view_chunk: int | None = None
) -> tuple[PartMemory, ...]:
    """Both parts of a model that is split at `split`, in the order they run, for images of `shape` (B, S, H, W).

    form        "fused" or "explicit", as of `memory.activation_bytes`
    view_chunk  views that the part which is per view takes at a time; None for all of them

    The larger `peak_bytes` is what a run takes beside the weights of both. Raises InputError.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown; choose from {', '.join(SPLITS)}")
    if view_chunk is not None and view_chunk < 1:
        raise InputError(f"view_chunk must be at least 1, got {view_chunk}")
    sizes = Sizes.of(config, shape)
    at_a_time = min(view_chunk or sizes.images, sizes.images)
    between = sizes.images * sizes.patches * _channels_between(config, split) * BYTES["float32"]
    found = []
    for role in SPLITS[split]:
        its = (1, at_a_time, *shape[2:]) if role in PER_VIEW else shape
        own = activation_bytes(config, its, form=form, precision=precision, part=role)
        found.append(PartMemory(role, its, own, between))
    return tuple(found)


def split_activation_bytes(
    config: ModelConfig, shape: Shape4, split: str, *, form: str, precision: str, view_chunk: int | None = None
) -> int:
    """Peak bytes beside the weights of a run of both parts: the larger one of `split_memory`. Raises InputError."""
    parts = split_memory(config, shape, split, form=form, precision=precision, view_chunk=view_chunk)
    return max(part.peak_bytes for part in parts)


def _channels_between(config: ModelConfig, split: str) -> int:
    """Of a patch's tokens: those of each layer that the heads read, once, or those of the encoder. export.parts."""
    if split == "encoder":
        return config.vit.embed_dim
    return len(set(config.dpt_head.intermediate_layer_idx)) * config.dpt_head.dim_in
