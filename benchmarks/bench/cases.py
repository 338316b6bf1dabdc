"""Which cases there are: every source in its backend, on every shape. Checked before anything is measured."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe3d_deploy import costs, planning
from moe3d_deploy.benchmarks.bench.report import FAILED, UNAVAILABLE, Case, Predicted, Round, Shape
from moe3d_deploy.bundle import Bundle, is_bundle
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import InputError
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.manifest import Preprocessing, ShapeRanges
from moe3d_deploy.memory import activation_bytes
from moe3d_deploy.memory_split import split_activation_bytes
from moe3d_deploy.runtime.session import Session
from moe3d_deploy.runtime.split_backend import VIEW_CHUNK

_DEFAULT_SHAPES = 3  # of planning.usual_shapes: 1, 2 and 4 views
# Form of `memory`, and whether 16-bit graphs are computed in float32.
_FORM = {
    "pytorch": ("eager", False),
    "pytorch-compiled": ("eager", False),
    "onnxruntime": ("fused", True),
    "onnxruntime-widespread": ("explicit", True),
    "onnxruntime-cuda": ("fused", False),
    "tensorrt-rtx": ("fused", False),
    "tensorrt": ("fused", False),
}
_OUTPUTS_OF_POINT_HEAD = ("point_map", "point_map_conf")


@dataclass(frozen=True)
class Source:
    """A model as it can be run: of a bundle, a checkpoint or a preset.

    config    with a point head only where a run computes it
    weights   the config whose weights are loaded
    options   of `Session.open`, and of a peer's runner
    split     where a bundle's model is cut in two; None for one in one file
    """

    source: str
    name: str
    kind: str
    backend: str
    precision: str
    config: ModelConfig
    weights: ModelConfig
    preprocessing: Preprocessing
    ranges: ShapeRanges
    options: dict[str, Any] = field(default_factory=dict)
    split: str | None = None

    def default_shapes(self) -> list[Shape]:
        """1, 2 and 4 views at the model's usual size, or of a bundle those that it takes, or its smallest."""
        usual = planning.usual_shapes(self.config)[:_DEFAULT_SHAPES]
        axes = (self.ranges.batch, self.ranges.views, self.ranges.height, self.ranges.width)
        return [shape for shape in usual if self.ranges.takes(shape)] or [tuple(axis.min for axis in axes)]  # type: ignore[list-item]

    def check(self, shape: Shape) -> None:
        """Raise InputError for a shape that the model or the bundle does not take."""
        costs.check_shape(self.config, shape)
        if not self.ranges.takes(shape):
            raise InputError(
                f"shape {'x'.join(map(str, shape))}: {self.kind} {self.source} does not take it; "
                f"it takes {_ranges_text(self.ranges)}"
            )


def open_source(source: str, *, backends: Sequence[str], **options: Any) -> Source:
    """What `source` is and the backend that it runs in; nothing large is read.

    backends   allowed ones, empty for any
    options    of `Session.open`: seed, allow_pickle, view_chunk, plugin; None for its own

    Raises what `Session.open` raises, and InputError where none of `backends` runs the source.
    """
    given = {name: value for name, value in options.items() if value not in (None, False)}
    session = Session.open(source, load=False, **given)
    backend = "onnxruntime" if is_bundle(source) else "pytorch"
    if backends and backend not in backends:
        remedy = (
            "name its checkpoint or preset as well" if backend == "onnxruntime"
            else f"make a bundle with: moe3d-export {source} -o bundle, and name it as well"
        )  # fmt: skip
        raise InputError(f"{source} runs in {backend}, which --backend leaves out; {remedy}, or leave --backend out")
    config = session.config
    if config is None:
        raise InputError(f"{source} does not say its model's config, so its work is not known; export it again")
    computed = any(name in _OUTPUTS_OF_POINT_HEAD for name in session.output_names)
    run = dataclasses.replace(config, point_head=computed)
    common = (run, run if is_bundle(source) else config, session.preprocessing, session.shapes)
    kind, precision, split = "checkpoint" if Path(source).exists() else "preset", "fp32", None
    if is_bundle(source):
        manifest = Bundle.open(source, verify="sizes", engines=False).manifest
        kind, precision, split = "bundle", manifest.precision, manifest.split
    return Source(source, session.name, kind, backend, precision, *common, given, split)


@dataclass(frozen=True)
class Planned:
    """A case before it is measured.

    missing   why this machine cannot run it: then it is not tried
    peer      of a source, not one itself
    options   of the measurement, where they are not those of all cases (`run.Options`)
    """

    source: Source
    shape: Shape
    missing: str | None = None
    peer: bool = False
    options: Any = None

    @property
    def label(self) -> str:
        return self.case(reason="not measured").label

    def absent(self) -> Case:
        """The case as a row that says why it is not measured."""
        return self.case(status=UNAVAILABLE, reason=self.missing)

    def case(
        self,
        rounds: tuple[Round, ...] = (),
        *,
        status: str = FAILED,
        reason: str | None = None,
        findings: Any = (),
        nodes: int | None = None,
    ) -> Case:
        """The case with what was measured, and what the arithmetic says beside it."""
        source, shape = self.source, self.shape
        type_of = PrecisionPolicy(source.precision).type_of
        form, in_float32 = _FORM[source.backend]
        computed = _widened(type_of) if in_float32 else type_of
        work = costs.flops_by_type(source.config, shape, computed)
        # `memory` knows PyTorch in float32 only.
        in_memory = "fp32" if in_float32 or form == "eager" else source.precision
        chunk = source.options.get("view_chunk")
        if source.split:
            chunk = chunk or VIEW_CHUNK
            activations = split_activation_bytes(
                source.config, shape, source.split, form=form, precision=in_memory, view_chunk=chunk
            )
        else:
            chunk = chunk if form == "eager" else None
            activations = activation_bytes(source.config, shape, form=form, precision=in_memory, view_chunk=chunk)
        return Case(
            model=source.name,
            kind=source.kind,
            backend=source.backend,
            precision=source.precision,
            shape=shape,
            work=work,
            weight_bytes=costs.weight_bytes(source.config, type_of),
            traffic_bytes=costs.traffic_bytes(source.config, shape, type_of),
            predicted=Predicted(form, costs.weight_bytes(source.weights, type_of), activations),
            status=status,
            reason=reason,
            findings=tuple(findings),
            rounds=rounds,
            nodes=nodes,
        )


def same_model(first: ModelConfig, second: ModelConfig) -> bool:
    """Whether two models are one but for the point head, which an export may leave out."""
    return dataclasses.replace(first, point_head=False) == dataclasses.replace(second, point_head=False)


def plan_cases(sources: Sequence[Source], shapes: Sequence[Shape]) -> list[Planned]:
    """Every source on every shape; without shapes on its own usual ones. Raises InputError for one that does not fit,
    and for two cases that would have the same name."""
    planned = []
    for source in sources:
        for shape in dict.fromkeys(shapes or source.default_shapes()):
            source.check(shape)
            planned.append(Planned(source, shape))
    check_labels(planned)
    return planned


def _widened(type_of: costs.TypeOf) -> costs.TypeOf:
    """What ONNX Runtime computes each layer in on a CPU."""
    return lambda name: "int8" if type_of(name) == "int8" else "float32"


def check_labels(planned: Sequence[Planned]) -> None:
    """Raise InputError for two cases that would have the same name."""
    labels: dict[str, str] = {}
    for item in planned:
        label = item.label
        if label in labels:
            raise InputError(
                f"{labels[label]} and {item.source.source} are both {label}: a report cannot tell them apart; "
                "measure one after the other and see moe3d bench --compare"
            )
        labels[label] = item.source.source


def views_shapes(sources: Sequence[Source], views: Sequence[int]) -> list[Shape]:
    """One scene of each number of views at the first source's usual size."""
    _, _, height, width = planning.usual_shapes(sources[0].config)[0]
    return [(1, count, height, width) for count in views]


def _ranges_text(ranges: ShapeRanges) -> str:
    texts = []
    for name in ("batch", "views", "height", "width"):
        axis = getattr(ranges, name)
        upwards = "and more" if axis.max is None else f"to {axis.max}"
        steps = f" in steps of {axis.step}" if axis.step > 1 else ""
        texts.append(f"{name} {axis.min}" if axis.min == axis.max else f"{name} {axis.min} {upwards}{steps}")
    return ", ".join(texts)
