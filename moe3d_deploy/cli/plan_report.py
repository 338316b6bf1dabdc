"""What `moe3d plan` prints: a plan as text of at most 100 columns, and as one JSON object."""

import shlex
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moe3d_deploy import costs
from moe3d_deploy.costs import Shape4
from moe3d_deploy.engines.profiles import VIEW_CHUNK
from moe3d_deploy.engines.shapes import AXES
from moe3d_deploy.manifest import PER_VIEW, SPLITS
from moe3d_deploy.planning import MOST_VIEWS, Change, Setup, ShapePlan, fits
from moe3d_deploy.runtime.split_backend import VIEW_CHUNK as RUN_VIEW_CHUNK
from moe3d_deploy.trt.installed import RTX_CAPABILITIES

WIDTH = 100
_LABEL_WIDTH = 13
_INDENT = "  "

_FORMS = {
    "eager": "PyTorch",
    "fused": "engine with fused attention, built for shapes up to this one",
    "explicit": "engine with attention weights in memory, built for shapes up to this one",
}
_ON_CPU = {
    "fused": "ONNX Runtime on the CPU, fused attention, all activations in float32",
    "explicit": "ONNX Runtime on the CPU, attention weights in memory, all activations in float32",
}
_CHANGES = {
    "views": "fewer views",
    "batch": "fewer scenes",
    "size": "smaller images",
    "precision": "other precision",
    "view_chunk": "heads in chunks",
}


@dataclass
class Report:
    """One answer of `moe3d plan`.

    changes     what makes a shape that does not fit fit
    refused     shapes that the planned bundle does not take
    most_views  (batch, 1, height, width) -> precision -> views that fit
    """

    name: str
    kind: str
    setup: Setup
    plans: list[ShapePlan]
    changes: dict[Shape4, list[Change]] = field(default_factory=dict)
    refused: list[Shape4] = field(default_factory=list)
    most_views: dict[Shape4, dict[str, int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: bytes, FLOPs and seconds, shapes as [batch, views, height, width]."""
        setup = self.setup
        return {
            "source": self.name,
            "kind": self.kind,
            "model_config": setup.config.to_dict(),
            "parameters": costs.parameters(setup.config),
            "precision": setup.precision,
            "form": setup.form,
            "view_chunk": setup.view_chunk,
            "split": setup.split,
            "weight_bytes": setup.weight_bytes,
            "device": setup.device.to_dict() if setup.device else None,
            "shapes": [self._shape(plan) for plan in self.plans],
            "notes": list(self._memory_notes()),
            "views_that_fit": [
                {"batch": shape[0], "height": shape[2], "width": shape[3], "views": views, "searched_to": MOST_VIEWS}
                for shape, views in self.most_views.items()
            ],
        }

    def _shape(self, plan: ShapePlan) -> dict[str, Any]:
        batch, views, height, width = plan.shape
        return {
            **asdict(plan),
            "parts": [{**asdict(part), "peak_bytes": part.peak_bytes} for part in plan.parts],
            "components": costs.flops(self.setup.config, batch, views, height, width),
            "peak_bytes": plan.peak_bytes,
            "floor": {**asdict(plan.floor), "bound": plan.floor.bound} if plan.floor else None,
            "taken_by_the_bundle": plan.shape not in self.refused,
            "changes_that_fit": [asdict(change) for change in self.changes.get(plan.shape, [])],
        }

    def lines(self) -> Iterator[str]:
        """The text form."""
        yield from self._head()
        yield ""
        yield from _table(self._header(), (self._row(plan) for plan in self.plans))
        notes = [line for plan in self.plans for line in self._notes(plan)]
        if notes:
            yield ""
            yield from notes
        if self.most_views:
            yield ""
            yield from self._views()
        yield ""
        yield from self._foot()

    def _head(self) -> Iterator[str]:
        setup, config = self.setup, self.setup.config
        experts = f"K = {config.moe.num_experts} experts" if config.moe else "no experts (VGGT head)"
        points = "with point head" if config.point_head else "no point head"
        yield _labelled("model", f"{self.kind} {self.name}, {experts}, {points}")
        counts = costs.parameters_by_type(config, setup.type_of)
        parameters = f"{sum(counts.values()) / 1e6:,.1f} M parameters in {setup.precision}"
        if len(counts) > 1:
            parameters += f" ({counts['float32'] / 1e6:,.1f} M of them float32)"
        yield _labelled("weights", f"{_bytes(setup.weight_bytes)}, {parameters}")
        chunk = f", {self._chunked} on {_views(setup.view_chunk)} at a time" if setup.view_chunk else ""
        yield _labelled("runs as", (_ON_CPU[setup.form] if self._in_onnx_runtime else _FORMS[setup.form]) + chunk)
        if setup.split:
            yield _labelled(
                "split", f"{' then '.join(SPLITS[setup.split])}: two files, both loaded, one after the other"
            )
        if setup.device:
            device = setup.device
            rates = ", ".join(f"{rate / 1e12:,.4g} TFLOP/s {kind}" for kind, rate in device.flops.items())
            yield _labelled("device", f"{device.title}, {_bytes(device.memory)}")
            yield _labelled("", f"{rates}, {device.bandwidth / 1e9:,.4g} GB/s")
            yield from _wrapped(_labelled("", ""), device.source, indent=_LABEL_WIDTH)

    def _header(self) -> tuple[str, ...]:
        device = self.setup.device
        bound = "" if device and device.measured else " >="
        floors = (f"compute{bound}", f"memory{bound}", "binds", "fits") if device else ()
        return ("shape BxSxHxW", "GFLOP", "experts", "activations", "peak", *floors)

    def _row(self, plan: ShapePlan) -> tuple[str, ...]:
        row = (
            _shape_text(plan.shape),
            _short(plan.flops / 1e9),
            f"{plan.expert_share:.2%}",
            _bytes(plan.activation_bytes),
            _bytes(plan.peak_bytes),
        )
        if plan.floor is None:
            return row
        floor = plan.floor
        return (*row, _seconds(floor.compute), _seconds(floor.memory), floor.bound, "yes" if plan.fits else "NO")

    def _notes(self, plan: ShapePlan) -> Iterator[str]:
        shape = _shape_text(plan.shape)
        if plan.parts:
            own = ", ".join(f"{part.role} {_bytes(part.activation_bytes)}" for part in plan.parts)
            between = _bytes(plan.parts[0].between_bytes)
            yield from _wrapped(f"{shape}: ", f"{own}; and {between} of tokens between them, in both")
        if plan.shape in self.refused:
            yield f"{shape}: the bundle does not take this shape"
        for warning in plan.warnings:
            yield from _wrapped(f"{shape}: ", warning)
        if plan.fits is not False or self.setup.device is None:
            return
        changes = self.changes.get(plan.shape, [])
        memory = _bytes(self.setup.device.memory)
        if changes:
            yield f"{shape} does not fit in {memory}; what does:"
        elif self.setup.weight_bytes > self.setup.device.memory:
            yield f"{shape} does not fit in {memory}: the weights alone are {_bytes(self.setup.weight_bytes)}."
        else:
            yield f"{shape} does not fit in {memory}, and no change of one thing makes it."
        yield from _table(None, (self._change(change) for change in changes))

    def _change(self, change: Change) -> tuple[str, ...]:
        flags = f"--shapes {_shape_text(change.shape)}"
        if change.precision != self.setup.precision:
            flags += f" --precision {change.precision}"
        if change.view_chunk:
            flags += f" --view-chunk {change.view_chunk}"
        return _INDENT + _CHANGES[change.kind], f"peak {_bytes(change.peak_bytes)}", flags

    def _views(self) -> Iterator[str]:
        for shape, views in self.most_views.items():
            scenes = f"{shape[0]} scenes of " if shape[0] > 1 else ""
            yield f"most views that fit, {scenes}{shape[2]}x{shape[3]} (height x width):"
            rows = (
                (f"{_INDENT}{precision}", f"{count} or more" if count == MOST_VIEWS else str(count))
                for precision, count in views.items()
            )
            yield from _table(None, rows)

    def _foot(self) -> Iterator[str]:
        setup = self.setup
        yield from _wrapped(
            "", "peak = weights + predicted activations; what the driver and other programs hold is not in it."
        )
        for note in self._memory_notes():
            yield from _wrapped("", note)
        if setup.device is None:
            yield "Add --device for times and for what fits."
        elif setup.device.measured:
            yield from _wrapped(
                "", "Times are at the rates numpy reached here; ONNX Runtime may be quicker. They are no prediction."
            )
        else:
            yield from _wrapped(
                "", "Times are floors, this work at the device's peaks. They are no prediction of a latency."
            )
        if setup.form != "eager":
            for label, command in self._next():
                yield _labelled(label, command)  # in one line, to be pasted

    @property
    def _chunked(self) -> str:
        """What takes its views a few at a time."""
        roles = SPLITS[self.setup.split] if self.setup.split else ()
        return next((role for role in roles if role in PER_VIEW), "dense heads")

    @property
    def _in_onnx_runtime(self) -> bool:
        return self.setup.on_cpu and self.setup.form != "eager"

    @property
    def _needs_tensorrt(self) -> bool:
        """The device is none that TensorRT-RTX builds for here."""
        device = self.setup.device
        return bool(device and device.compute_capability and device.compute_capability not in RTX_CAPABILITIES)

    def _memory_notes(self) -> Iterator[str]:
        """What the predicted activations leave open."""
        setup = self.setup
        if setup.config.point_head:
            yield "Activations are predicted without the point head."
        if setup.form == "eager":
            return
        if setup.config.moe and not setup.merged:
            yield "Activations are predicted for merged experts; this bundle keeps a convolution for each."
        if setup.on_cpu:
            yield "ONNX Runtime took 1.3 to 1.8 times these activations where it was measured; leave room for twice."
        if self._needs_tensorrt:
            yield (
                "Activations are modelled on TensorRT-RTX, which builds nothing for this device here; TensorRT's were "
                "not compared with this prediction."
            )

    def _next(self) -> Iterator[tuple[str, str]]:
        """Commands that make the bundle and the engines for the shapes that fit, each with its label."""
        shapes = [plan.shape for plan in self.plans if plan.fits is not False and plan.shape not in self.refused]
        if not shapes:
            return
        source = shlex.quote(self.name)
        export = f"moe3d-export {source} -o bundle --precision {self.setup.precision}"
        export += " --outputs point_map" if self.setup.config.point_head else ""
        export += f" --split {self.setup.split}" if self.setup.split else ""
        exported = self.kind == "bundle"
        if self._in_onnx_runtime:
            chunk = self.setup.view_chunk if self.setup.split else None
            flag = f" --view-chunk {chunk}" if chunk not in (None, RUN_VIEW_CHUNK) else ""
            yield "next", f"moe3d run {source} IMAGES... -o out{flag}" if exported else f"{export} --builder none"
            return
        another = f"moe3d-export {source if exported else 'bundle'}"
        engines = self._engines(shapes)
        if not self._needs_tensorrt:
            yield "next", (another if exported else export) + engines.pop(0)
            yield from (("", another + engine) for engine in engines)
            return
        if not exported:
            yield "next", f"{export} --builder none"
        yield from (("on device", f"{another} --builder tensorrt{engine}") for engine in engines)

    def _engines(self, shapes: list[Shape4]) -> list[str]:
        """Flags of one engine for all shapes, or of one each where the largest of every axis together is too much."""
        chunk, axes = self._chunk_flag(), list(zip(*shapes, strict=True))
        batch, views, height, width = (max(sizes) for sizes in axes)
        if self.setup.device is None or fits(self.setup, (batch, views, height, width)):
            return [_flags(axes) + chunk]
        return [_flags([(size,) for size in shape]) + chunk for shape in dict.fromkeys(shapes)]

    def _chunk_flag(self) -> str:
        """Of engines whose heads take other numbers of views than usual; an encoder's takes all."""
        chunk = self.setup.view_chunk if self.setup.split == "heads" else None
        return f" --view-chunk {chunk}" if chunk not in (None, VIEW_CHUNK) else ""


def _flags(axes: Sequence[Sequence[int]]) -> str:
    """An engine's flags from the sizes of every axis."""
    ranges = {name: (min(sizes), max(sizes)) for name, sizes in zip(AXES, axes, strict=True)}
    if ranges["batch"] == (1, 1):
        del ranges["batch"]
    return "".join(f" --{name} {low}" + (f":{high}" if high > low else "") for name, (low, high) in ranges.items())


def _labelled(label: str, text: str) -> str:
    return label.ljust(_LABEL_WIDTH) + text


def _wrapped(start: str, text: str, indent: int = 2) -> Iterator[str]:
    """`text` after `start`, broken at spaces into lines of at most WIDTH columns."""
    yield from textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * indent)


def _table(header: tuple[str, ...] | None, rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Columns side by side, the first and the last of them to the left, numbers to the right."""
    lines = ([header] if header else []) + list(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))] if lines else []
    for line in lines:
        last = len(line) - 1
        pairs = enumerate(zip(line, widths, strict=True))
        cells = [cell.ljust(width) if i in (0, last) else cell.rjust(width) for i, (cell, width) in pairs]
        yield "  ".join(cells).rstrip()


def _shape_text(shape: Shape4) -> str:
    return "x".join(map(str, shape))


def _views(count: int) -> str:
    return f"{count} view{'s' if count > 1 else ''}"


def _bytes(count: float) -> str:
    return f"{_short(count / 1e6)} MB" if count < 1e9 else f"{_short(count / 1e9)} GB"


def _seconds(value: float) -> str:
    return f"{_short(value * 1e3)} ms" if value < 1 else f"{_short(value)} s"


def _short(value: float) -> str:
    """Three digits or more, none after the point that says nothing."""
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{decimals}f}"
