"""What a run of a given shape takes: work, memory, the least time on a device, and what to change where it is too big.

Arithmetic over `costs`, `memory` and `devices`; nothing is loaded and nothing is run.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from moe3d_deploy import costs
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.costs import Shape4, TypeOf
from moe3d_deploy.devices import CPU, Device
from moe3d_deploy.errors import InputError
from moe3d_deploy.manifest import PER_VIEW, WITH_HEADS, Range, ShapeRanges
from moe3d_deploy.memory_split import PartMemory, split_memory

MOST_VIEWS = 4096  # where a search for more views ends

GLOBAL_ATTENTION = "aggregator.global_blocks.0.attn.qkv.bias"  # weights alone may have 8 bits
_PRODUCT = "aggregator.global_blocks.0.attn.qkv.weight"
_LARGEST_VOLUME = 2**31 - 1  # values of a convolution's input or output that TensorRT documents
_HALF_MAX = 65504


@dataclass(frozen=True)
class Setup:
    """What is run, and where.

    config      the model as it is run: its `point_head` says whether that head is
    precision   by name, for `memory`; `type_of` is its rule
    form        of the attention: "eager" (PyTorch, float32 only), "fused" or "explicit" (engines); see `memory`
    merged      one convolution for all experts, as exports have it
    view_chunk  views that the dense heads take at a time in PyTorch, or the part of a split model that is per view;
                None for all
    ranges      shapes that the file takes; None for all that the model takes
    split       where the model is cut into two files, a key of manifest.SPLITS; None for one file
    """

    config: ModelConfig
    precision: str
    type_of: TypeOf
    form: str
    device: Device | None = None
    merged: bool = True
    view_chunk: int | None = None
    ranges: ShapeRanges | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        if self.view_chunk is not None and self.form != "eager" and self.split is None:
            raise InputError(
                "views in chunks exist in PyTorch and in a split model only: take form eager, or leave view_chunk out"
            )
        if self.split is not None and self.form == "eager":
            raise InputError("a split model does not run in PyTorch: leave form eager out, or the split")
        device = self.device
        if device and (missing := next((kind for kind in self._types() if kind not in device.flops), None)):
            raise InputError(
                f"device {device.name} computes no {missing}, which {self.precision} needs; change one of them"
            )

    @property
    def on_cpu(self) -> bool:
        """Whether ONNX Runtime, or PyTorch, runs it on the CPU."""
        return _on_cpu(self.type_of, self.device)

    @functools.cached_property
    def allowed(self) -> ShapeRanges:
        """The shapes that can be run."""
        return self.ranges or ShapeRanges.of(self.config)

    def takes(self, shape: Shape4) -> bool:
        """Whether the file takes this shape."""
        return self.allowed.takes(shape)

    @functools.cached_property
    def weight_bytes(self) -> int:
        return costs.weight_bytes(self.config, self.type_of)

    def _types(self) -> list[str]:
        patch = self.config.patch_size
        return list(costs.flops_by_type(self.config, (1, 1, patch, patch), self.type_of))


@dataclass(frozen=True)
class Floor:
    """Seconds of the work at the device's peaks: its products at their rates, its bytes at the memory's bandwidth."""

    compute: float
    memory: float

    @property
    def bound(self) -> str:
        return "compute" if self.compute >= self.memory else "memory"


@dataclass(frozen=True)
class Change:
    """One thing to change so that a run fits, found by search. `kind`: views, batch, size, precision or view_chunk."""

    kind: str
    shape: Shape4
    precision: str
    view_chunk: int | None
    peak_bytes: int


@dataclass(frozen=True)
class ShapePlan:
    """One shape's costs; `floor` and `fits` are None without a device; `parts` are those of a split model."""

    shape: Shape4
    flops: int
    expert_share: float
    weight_bytes: int
    activation_bytes: int
    traffic_bytes: int
    floor: Floor | None
    fits: bool | None
    warnings: tuple[str, ...]
    parts: tuple[PartMemory, ...] = ()

    @property
    def peak_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes


def usual_form(type_of: TypeOf, device: Device | None) -> str:
    """The attention's form where nobody says otherwise: engines fuse it in 16 bits, ONNX Runtime on a CPU always."""
    return "fused" if _on_cpu(type_of, device) or type_of(GLOBAL_ATTENTION) != "float32" else "explicit"


def _on_cpu(type_of: TypeOf, device: Device | None) -> bool:
    """Whether that is the device, or the only place for products in 8 bits."""
    return device.name == CPU if device else type_of(_PRODUCT) == "int8"


def usual_shapes(config: ModelConfig) -> list[Shape4]:
    """One scene of 1, 2, 4, 8 and 16 views, as wide as the model's size and 392/518 of it high, in whole patches."""
    height = max(1, round(config.pos_embed_grid * 392 / 518)) * config.patch_size
    return [(1, views, height, config.img_size) for views in (1, 2, 4, 8, 16)]


def plan(setup: Setup, shape: Shape4) -> ShapePlan:
    """All figures of one run on (batch, views, height, width). Raises InputError for a shape the model cannot take."""
    batch, views, height, width = shape
    floor = _floor(setup, shape) if setup.device else None
    weights, activations = setup.weight_bytes, _activation_bytes(setup, shape)
    parts = parts_of(setup, shape)
    warnings = [text for part in parts for text in warnings_of(setup, part.shape, part.role)]
    return ShapePlan(
        shape=shape,
        flops=costs.total_flops(setup.config, views, height, width, batch=batch),
        expert_share=costs.expert_share(setup.config, views, height, width),
        weight_bytes=weights,
        activation_bytes=activations,
        traffic_bytes=costs.traffic_bytes(setup.config, shape, setup.type_of),
        floor=floor,
        fits=weights + activations <= setup.device.memory if setup.device else None,
        warnings=tuple(warnings if parts else warnings_of(setup, shape)),
        parts=parts,
    )


def largest_views(setup: Setup, shape: Shape4) -> int:
    """The most views per scene that fit on the device, at the batch and size of `shape`: up to MOST_VIEWS, and of those
    that the file takes; 0 for none."""
    batch, _, height, width = shape
    counts = _values(setup.allowed.views, MOST_VIEWS)
    return _largest(counts, lambda views: fits(setup, (batch, views, height, width)))


def fits(setup: Setup, shape: Shape4) -> bool:
    """Whether weights and activations are at most the memory of the setup's device. Raises InputError without one."""
    if setup.device is None:
        raise InputError("whether a run fits depends on a device; name one")
    return _peak(setup, shape) <= setup.device.memory


def changes_that_fit(setup: Setup, shape: Shape4, others: Sequence[Setup] = ()) -> list[Change]:
    """What, changed alone, makes a run of `shape` fit: fewer views or scenes, smaller images, a precision of `others`,
    and in PyTorch heads in chunks. Only shapes that the file takes. Empty where none of them does."""
    batch, views, height, width = shape
    allowed = setup.allowed
    found: list[Change] = []

    def add(kind: str, changed: Setup, smaller: Shape4) -> None:
        if changed.takes(smaller):
            peak = _peak(changed, smaller)
            found.append(Change(kind, smaller, changed.precision, changed.view_chunk, peak))

    def of_height(size: int) -> Shape4:
        return batch, views, size, _nearest(allowed.width, width * size / height)

    if most := _largest(_values(allowed.views, views - 1), lambda count: fits(setup, (batch, count, height, width))):
        add("views", setup, (batch, most, height, width))
    if most := _largest(_values(allowed.batch, batch - 1), lambda count: fits(setup, (count, views, height, width))):
        add("batch", setup, (most, views, height, width))
    if most := _largest(_values(allowed.height, height - 1), lambda size: fits(setup, of_height(size))):
        add("size", setup, of_height(most))
    for other in others:
        if fits(other, shape):
            add("precision", other, shape)
    if setup.form == "eager" or setup.split == "heads":
        largest_chunk = (setup.view_chunk or batch * views) - 1
        if most := _largest(range(1, largest_chunk + 1), lambda count: fits(replace(setup, view_chunk=count), shape)):
            add("view_chunk", replace(setup, view_chunk=most), shape)
    return found


def _floor(setup: Setup, shape: Shape4) -> Floor:
    device = setup.device
    if device is None:
        raise InputError("a least time depends on a device; name one")
    work = costs.flops_by_type(setup.config, shape, setup.type_of)
    moved = costs.traffic_bytes(setup.config, shape, setup.type_of)
    return Floor(sum(count / device.flops[kind] for kind, count in work.items()), moved / device.bandwidth)


def warnings_of(setup: Setup, shape: Shape4, part: str | None = None) -> Iterator[str]:
    """Limits that a shape crosses and that no figure shows; `part` is the role of a part of a split model."""
    batch, views, height, width = shape
    if setup.form == "eager" or setup.on_cpu:
        return
    volume = _convolution_volume(setup, height, width)
    if part in WITH_HEADS and batch * views * volume > _LARGEST_VOLUME:
        yield (
            f"a convolution has {batch * views * volume:,} values, more than the 2^31 - 1 that TensorRT documents; "
            f"{_LARGEST_VOLUME // volume} views in all stay below: verify such a run on the device"
        )
    tokens = costs.Sizes.of(setup.config, shape).tokens
    if part in PER_VIEW:
        return  # attention inside a view at most
    if setup.type_of(GLOBAL_ATTENTION) == "float16" and views * tokens > _HALF_MAX:
        yield (
            f"global attention has {views * tokens:,} keys; a fused kernel that sums its softmax in float16 overflows "
            f"past {_HALF_MAX:,}, which {_HALF_MAX // tokens} views stay below: verify such a run on the device"
        )


def _convolution_volume(setup: Setup, height: int, width: int) -> int:
    """Values of one view in the largest tensor that a convolution reads or writes."""
    config, moe = setup.config, setup.config.moe
    wide = config.dpt_head.features // 2
    if moe and setup.merged:
        wide = max(wide, moe.num_experts * moe.hidden_channels + moe.gate_hidden_channels)
    elif moe:
        wide = max(wide, moe.hidden_channels, moe.gate_hidden_channels)
    patches = height * width // config.patch_size**2
    return max(wide * height * width, 64 * patches * config.dpt_head.features)


def _peak(setup: Setup, shape: Shape4) -> int:
    return setup.weight_bytes + _activation_bytes(setup, shape)


def parts_of(setup: Setup, shape: Shape4) -> tuple[PartMemory, ...]:
    """What each part of a split model takes; empty for one file."""
    if setup.split is None:
        return ()
    precision = _computed_in(setup)
    return split_memory(
        setup.config, shape, setup.split, form=setup.form, precision=precision, view_chunk=setup.view_chunk
    )


def _computed_in(setup: Setup) -> str:
    return "fp32" if setup.on_cpu else setup.precision  # ONNX Runtime computes 16-bit graphs in float32 on a CPU


def _activation_bytes(setup: Setup, shape: Shape4) -> int:
    from moe3d_deploy.memory import activation_bytes

    costs.check_shape(setup.config, shape)
    if parts := parts_of(setup, shape):
        return max(part.peak_bytes for part in parts)
    precision = _computed_in(setup)
    return activation_bytes(setup.config, shape, form=setup.form, precision=precision, view_chunk=setup.view_chunk)


def _values(axis: Range, most: int) -> range:
    """What `axis` allows, up to `most`."""
    return range(axis.min, (most if axis.max is None else min(axis.max, most)) + 1, axis.step)


def _nearest(axis: Range, size: float) -> int:
    """The value of `axis` nearest to `size`."""
    value = axis.min + max(0, round((size - axis.min) / axis.step)) * axis.step
    return value if axis.max is None else min(value, _values(axis, axis.max)[-1])


def _largest(values: range, good: Callable[[int], bool]) -> int:
    """The largest of rising `values` that is good, 0 for none; whatever is below a good one is good too."""
    low, high = 0, len(values)  # the first `low` are good, those from `high` on are not
    while low < high:
        middle = (low + high + 1) // 2
        if good(values[middle - 1]):
            low = middle
        else:
            high = middle - 1
    return values[low - 1] if low else 0
