"""Which heads are compared, and measuring them: every case in processes of its own, in turns."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe3d_deploy import costs
from moe3d_deploy.benchmarks.bench.cases import Source, same_model, views_shapes
from moe3d_deploy.benchmarks.bench.price import (
    BUNDLE,
    FAILED,
    FUNCTION,
    HEAD,
    KERNEL,
    MEASURED,
    MODEL,
    PLAIN,
    SINGLE,
    Price,
    PriceCase,
    PriceRound,
    Shape,
)
from moe3d_deploy.benchmarks.bench.price_agreement import LIMITS
from moe3d_deploy.benchmarks.bench.run import Options, Tell, as_json_has_it, reason_of
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.child import Emit, run_in_child
from moe3d_deploy.config import ModelConfig, MoeConfig
from moe3d_deploy.errors import InputError, Moe3dError, require
from moe3d_deploy.runtime.expert_mix_choice import choose_mix
from moe3d_deploy.strict_fields import read

Child = Callable[[dict[str, Any], Emit], dict[str, Any]]

EXPERTS = (2, 4, 8)
VIEWS = {"cpu": (1, 2), "cuda": (1, 2, 4, 8, 16)}
_PRECISION = {"cpu": "fp32", "cuda": "fp16"}  # of PyTorch
_NO_GPU = "the kernel needs a GPU that PyTorch sees, and there is none"
_SEEDS_OF_A_PROCESS = 100_000  # more than it has turns


@dataclass(frozen=True)
class PlannedPrice:
    """`case` has everything but its rounds; `request` is what its process is asked, but for effort and seed."""

    case: PriceCase
    request: dict[str, Any]


@dataclass(frozen=True)
class PricePlan:
    """`exports` are the requests, but for a folder, for the dense heads of ONNX Runtime, by the number of experts."""

    model: str
    config: ModelConfig
    planned: tuple[PlannedPrice, ...]
    exports: dict[int, dict[str, Any]]


def plan_price(
    checkpoint: Source,
    bundles: Sequence[Source],
    shapes: Sequence[Shape],
    experts: Sequence[int],
    backends: Sequence[str],
    *,
    device: str,
) -> PricePlan:
    """The cases: the whole model with the checkpoint's own number of experts, and the head with each number.

    bundles    of the checkpoint; the first that is float32 or fp16 gives ONNX Runtime's total, and its heads' precision
    shapes     empty: VIEWS of the device at the model's usual size
    backends   empty: PyTorch, and on a machine without a GPU ONNX Runtime
    device     of PyTorch, "cpu" or "cuda"

    Raises InputError for what does not fit, MissingExtraError where a package is missing.
    """
    for bundle in bundles:
        if not same_model(bundle.config, checkpoint.config):
            raise InputError(
                f"bundle {bundle.source} has another config than {checkpoint.source}, and --price compares heads of "
                "one model; leave it out, or export it again"
            )
    chosen = backends or (("pytorch",) if device == "cuda" else ("pytorch", "onnxruntime"))
    shapes = tuple(dict.fromkeys(shapes or views_shapes([checkpoint], VIEWS[device])))
    for shape in shapes:
        checkpoint.check(shape)
    own = checkpoint.config.moe or MoeConfig()
    counts = sorted({*experts, own.num_experts})
    planner = _Planner(checkpoint, own, device)
    planned: list[PlannedPrice] = []
    exports: dict[int, dict[str, Any]] = {}
    for backend in dict.fromkeys(chosen):
        if backend == "pytorch":
            planned += [planner.torch(MODEL, own, shape) for shape in shapes]
            planned += [planner.torch(HEAD, planner.moe(count), shape) for shape in shapes for count in counts]
            continue
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package)
        usable = next((bundle for bundle in bundles if bundle.precision in LIMITS), None)
        precision = usable.precision if usable else "fp32"
        if usable:
            planned += [planner.bundle(usable, shape) for shape in shapes]
        planned += [planner.heads(planner.moe(count), shape, precision) for shape in shapes for count in counts]
        exports = {count: planner.export(planner.moe(count), precision) for count in counts}
    return PricePlan(checkpoint.name, checkpoint.weights, tuple(planned), exports)


class _Planner:
    def __init__(self, checkpoint: Source, own: MoeConfig, device: str) -> None:
        from moe3d_deploy.export.source import SourceSpec

        self._checkpoint = checkpoint
        self._own = own
        self._device = device
        options = {name: value for name, value in checkpoint.options.items() if name in ("seed", "allow_pickle")}
        self._spec = SourceSpec(checkpoint.source, **options)
        self._base = self._spec.open()

    def moe(self, count: int) -> MoeConfig:
        return dataclasses.replace(self._own, num_experts=count)

    def torch(self, part: str, moe: MoeConfig, shape: Shape) -> PlannedPrice:
        config = dataclasses.replace(self._checkpoint.config, moe=moe)
        choice = choose_mix(self._checkpoint.options.get("plugin"), config, (), self._device)
        missing = {} if choice.library else {KERNEL: choice.note or _NO_GPU}
        request = {"library": str(choice.library) if choice.library else None}
        return self._planned("pytorch", _PRECISION[self._device], part, moe, shape, missing, request)

    def heads(self, moe: MoeConfig, shape: Shape, precision: str) -> PlannedPrice:
        return self._planned("onnxruntime", precision, HEAD, moe, shape, {}, {"config": self._base.config.to_dict()})

    def bundle(self, bundle: Source, shape: Shape) -> PlannedPrice:
        bundle.check(shape)
        manifest = Bundle.open(bundle.source, verify="sizes", engines=False).manifest
        form = SINGLE if bundle.config.moe is None else FUNCTION if manifest.merged_experts else PLAIN
        request = {"bundle": bundle.source, "bundle_form": form}
        return self._planned("onnxruntime", bundle.precision, BUNDLE, self._own, shape, {}, request)

    def export(self, moe: MoeConfig, precision: str) -> dict[str, Any]:
        return {"source": dataclasses.asdict(self._spec), "moe": dataclasses.asdict(moe), "precision": precision}

    def _planned(
        self,
        backend: str,
        precision: str,
        part: str,
        moe: MoeConfig,
        shape: Shape,
        missing: dict[str, str],
        request: dict[str, Any],
    ) -> PlannedPrice:
        single, experts = head_flops(self._checkpoint.config, moe, shape)
        case = PriceCase(
            backend=backend,
            precision=precision,
            part=part,
            num_experts=moe.num_experts,
            shape=shape,
            single_flop=single,
            experts_flop=experts,
            seeded_weights=self._seeded(moe),
            missing=missing,
            status=FAILED,
            reason="not measured",
            rounds=(),
        )
        common = {
            "backend": backend,
            "part": part,
            "shape": list(shape),
            "precision": precision,
            "source": dataclasses.asdict(self._spec),
            "moe": dataclasses.asdict(moe),
        }
        return PlannedPrice(case, {**common, **request})

    def _seeded(self, moe: MoeConfig) -> bool:
        from moe3d_deploy.benchmarks.bench.price_forms import Completed

        return any(Completed.of(self._base, each).seeded for each in (None, moe))


def head_flops(config: ModelConfig, moe: MoeConfig, shape: Shape) -> tuple[int, int]:
    """FLOP of the whole model on a shape (B, S, H, W), without a point head: with VGGT's head, and with experts."""
    batch, views, height, width = shape
    single, experts = (
        costs.total_flops(dataclasses.replace(config, moe=each), views, height, width, batch=batch, point_head=False)
        for each in (None, moe)
    )
    return single, experts


def measure_in_child(request: dict[str, Any], on_event: Emit) -> dict[str, Any]:
    """One process of a case; see `run_in_child` for what it raises."""
    function = "moe3d_deploy.benchmarks.bench.price_measure:measure_price"
    return run_in_child(function, request, title="the case's process", on_event=on_event).value


def export_in_child(request: dict[str, Any], on_event: Emit) -> dict[str, Any]:
    """The dense heads' files of one number of experts, by form."""
    function = "moe3d_deploy.benchmarks.bench.price_onnx:export_heads"
    return run_in_child(function, request, title="the export of the heads", on_event=on_event).value


def run_price(
    plan: PricePlan,
    options: Options,
    *,
    measure: Child = measure_in_child,
    export: Child = export_in_child,
    keep: Callable[[Price, int], None] = lambda price, done: None,
    tell: Tell = lambda label, text: None,
) -> Price:
    """Measure and return the section.

    Every case gets its first process, then every case its second one, and so on; a case that fails gets no more. ONNX
    Runtime's heads are exported into a temporary folder before that.

    keep   gets what is finished and the number of processes, after every one of them
    tell   gets (case, what is being done)
    """
    cases: dict[int, PriceCase] = {}
    of_price = {name: value for name, value in dataclasses.asdict(options).items() if name != "pipeline_runs"}

    def section() -> Price:
        return Price(plan.model, plan.config.to_dict(), of_price, tuple(cases[i] for i in sorted(cases)))

    done = 0
    with tempfile.TemporaryDirectory(prefix="moe3d-price-") as folder:
        files = {
            count: _exported(count, request, Path(folder), export, tell) for count, request in plan.exports.items()
        }
        for process in range(options.processes):
            for i, item in enumerate(plan.planned):
                before = cases.get(i)
                if before is None or before.status == MEASURED:
                    request = item.request | {
                        "threads": options.threads,
                        "seed": options.seed + process * _SEEDS_OF_A_PROCESS,
                        "effort": dataclasses.asdict(options.effort),
                    }
                    found = files.get(item.case.num_experts) if _needs_files(item) else {}
                    cases[i] = _measured(before or item.case, request, found, measure, tell)
                done += 1
                keep(section(), done)
    return section()


def _needs_files(item: PlannedPrice) -> bool:
    return item.case.backend == "onnxruntime" and item.case.part == HEAD


def _exported(count: int, request: dict[str, Any], folder: Path, export: Child, tell: Tell) -> dict[str, Any] | str:
    """{form: file}, or why there are none."""
    label = f"head of {count} experts"
    into = folder / str(count)
    into.mkdir()
    try:
        return export({**request, "folder": str(into)}, lambda event: tell(label, event["step"]))
    except (Moe3dError, OSError, ValueError) as error:
        tell(label, reason := reason_of(error))
        return reason


def _measured(
    case: PriceCase, request: dict[str, Any], files: dict[str, Any] | str | None, measure: Child, tell: Tell
) -> PriceCase:
    """The case with one process more."""
    if isinstance(files, str):
        return dataclasses.replace(case, status=FAILED, reason=files)
    try:
        values = measure({**request, "files": files}, lambda event: tell(case.label, event["step"]))
    except (Moe3dError, OSError, ValueError) as error:  # a ValueError: killed while it was writing a line
        tell(case.label, reason := reason_of(error))
        return dataclasses.replace(case, status=FAILED, reason=reason)
    found = read(PriceRound, as_json_has_it(values), "")
    return dataclasses.replace(case, status=MEASURED, reason=None, rounds=(*case.rounds, found))
