"""Measure parity: the reference at every shape, then one variant after another, each alone in a process of its own."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.benchmarks.bench import parity_compare
from moe3d_deploy.benchmarks.bench.parity import (
    COMPARED,
    FAILED,
    LEFT_OUT,
    NOT_RUN,
    Cell,
    Difference,
    Input,
    Parity,
    Variant,
)
from moe3d_deploy.benchmarks.bench.parity_inputs import read_inputs
from moe3d_deploy.benchmarks.bench.parity_models import open_model
from moe3d_deploy.benchmarks.bench.parity_plan import ParityPlan, PlannedVariant
from moe3d_deploy.benchmarks.environment import without_paths
from moe3d_deploy.child import Emit, run_in_child
from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.strict_fields import read

Measure = Callable[[str, dict[str, Any], Emit], None]
Tell = Callable[[str, str], None]

_HERE = "moe3d_deploy.benchmarks.bench.parity_run"
_INPUTS = "moe3d_deploy.benchmarks.bench.parity_inputs:make_inputs"


def in_child(function: str, request: dict[str, Any], on_event: Emit) -> None:
    """Run "module:function" in a process of its own; see `run_in_child` for what it raises."""
    run_in_child(function, request, title="the process", on_event=on_event)


def run_parity(
    plan: ParityPlan,
    *,
    measure: Measure = in_child,
    keep: Callable[[Parity], None] = lambda parity: None,
    tell: Tell = lambda what, step: None,
) -> Parity:
    """Measure every variant of the plan beside its reference.

    keep   gets the section after the reference and after every shape of a variant
    tell   gets what is at work, and the shape

    What the reference gives lies in a temporary folder, which goes however this ends. What interrupts it passes
    through, and `keep` has what was finished. A process that dies costs the shape that it was at, and another goes on
    with the next.
    """
    with tempfile.TemporaryDirectory(prefix="moe3d-parity-") as folder:
        return _Run(plan, folder, measure, keep, tell).run()


def run_reference(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child: the reference's outputs at every place of `indices`, as .npy files in `folder`.

    model    of `open_model`
    names    the outputs whose errors are wanted
    """
    opened = open_model(request["model"])
    emit({"device": opened.device})
    folder = Path(request["folder"])
    for index in request["indices"]:
        emit({"step": index})
        with _told(index, emit):
            pixels, truth = read_inputs(folder, index)
            outputs = _wanted(opened.run(pixels), request["names"])
            for name, values in outputs.items():
                np.save(_file(folder, index, name), values)
            emit({"done": index, "truth_f1": parity_compare.mean_boundary(outputs["depth"], truth)})
    return {}


def run_variant(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child: a variant beside the reference's outputs at every place of `indices`; arguments as of `run_reference`."""
    opened = open_model(request["model"])
    emit({"device": opened.device})
    folder, names = Path(request["folder"]), request["names"]
    for index in request["indices"]:
        emit({"step": index})
        with _told(index, emit):
            pixels, truth = read_inputs(folder, index)
            found = _wanted(opened.run(pixels), names)
            there = [*names, parity_compare.EXPERTS]
            files = {name: _file(folder, index, name) for name in there if _file(folder, index, name).exists()}
            expected = {name: np.load(file) for name, file in files.items()}
            difference = parity_compare.difference(found, expected, names, truth)
            emit({"done": index, "found": dataclasses.asdict(difference)})
    return {}


class _Run:
    """One measurement, as far as it is."""

    def __init__(self, plan: ParityPlan, folder: str, measure: Measure, keep: Callable[[Parity], None], tell: Tell):
        self._plan, self._folder, self._measure, self._keep, self._tell = plan, folder, measure, keep, tell
        self._device: str | None = None
        self._inputs: list[Input] = []
        self._variants: list[Variant] = []

    def run(self) -> Parity:
        self._make_inputs()
        self._run_reference()
        self._keep(self._parity())
        for planned in self._plan.variants:
            self._variants.append(planned.variant())
            if planned.runs:
                self._run_variant(planned)
            self._keep(self._parity())
        return self._parity()

    def _parity(self) -> Parity:
        plan = self._plan
        return Parity(
            plan.model, plan.config.to_dict(), plan.sha256, plan.parameters, plan.reference, self._device,
            tuple(self._inputs), tuple(self._variants),
        )  # fmt: skip

    def _make_inputs(self) -> None:
        shapes = self._plan.shapes
        request = {"shapes": [list(shape) for shape in shapes]}
        made: dict[int, str] = {}

        def on_event(index: int, event: Mapping[str, Any]) -> None:
            made[index] = event["images"]

        faults = self._over_shapes(_INPUTS, request, range(len(shapes)), "images", on_event)
        self._inputs = [
            Input(shape, made.get(i, "none"), faults.get(i), None) for i, shape in enumerate(shapes)
        ]  # fmt: skip

    def _run_reference(self) -> None:
        plan, scores = self._plan, dict[int, float | None]()

        def on_event(index: int, event: Mapping[str, Any]) -> None:
            scores[index] = event["truth_f1"]

        def on_device(device: str) -> None:
            self._device = device

        request = {"model": plan.reference_model, "names": list(plan.names)}
        there = [i for i, item in enumerate(self._inputs) if item.reference is None]
        faults = self._over_shapes(
            f"{_HERE}:run_reference", request, there, f"reference {plan.reference}", on_event, on_device
        )
        for i in there:
            self._inputs[i] = dataclasses.replace(self._inputs[i], reference=faults.get(i), truth_f1=scores.get(i))

    def _run_variant(self, planned: PlannedVariant) -> None:
        cells: dict[int, Cell] = {}
        for i, item in enumerate(self._inputs):
            reason = planned.left_out(item.shape) or (item.reference and "the reference did not run at this shape")
            if reason:
                cells[i] = Cell(LEFT_OUT, reason, None)

        def update(**changes: Any) -> None:
            there = 0  # cells are in the order of the shapes, without a gap
            while there in cells:
                there += 1
            whole = tuple(cells[i] for i in range(there))
            self._variants[-1] = dataclasses.replace(self._variants[-1], cells=whole, **changes)

        def on_event(index: int, event: Mapping[str, Any]) -> None:
            cells[index] = Cell(COMPARED, None, read(Difference, event["found"], ""))
            update()
            self._keep(self._parity())

        request = {"model": planned.model, "names": list(planned.names)}
        to_run = [i for i in range(len(self._inputs)) if i not in cells]
        faults = self._over_shapes(
            f"{_HERE}:run_variant", request, to_run, planned.label, on_event, lambda device: update(device=device)
        )
        for i, reason in faults.items():
            cells[i] = Cell(FAILED, reason, None)
        update()
        if to_run and len(faults) == len(to_run):
            update(status=FAILED, reason=next(iter(faults.values())))
        elif not to_run:
            update(status=NOT_RUN, reason="; ".join(dict.fromkeys(str(cell.reason) for cell in cells.values())))

    def _over_shapes(
        self,
        function: str,
        request: Mapping[str, Any],
        indices: Sequence[int],
        what: str,
        on_done: Callable[[int, Mapping[str, Any]], None],
        on_device: Callable[[str], None] = lambda device: None,
    ) -> dict[int, str]:
        """Call a child for all shapes, and again for those after one that ended it; why which shape failed."""
        faults: dict[int, str] = {}
        pending = list(indices)
        while pending:
            at: list[int] = []

            def on_event(event: Mapping[str, Any], at: list[int] = at) -> None:
                if "device" in event:
                    on_device(event["device"])
                elif "step" in event:
                    at[:] = [event["step"]]
                    self._tell(what, "x".join(map(str, self._plan.shapes[event["step"]])))
                elif "fault" in event:
                    faults[event["done"]] = _one_line(event["fault"])
                else:
                    on_done(event["done"], event)

            try:
                self._measure(function, {**request, "folder": self._folder, "indices": pending}, on_event)
                return faults
            except (Moe3dError, OSError, ValueError) as error:  # a ValueError: killed while it was writing a line
                reason = _one_line(str(error)) or type(error).__name__
            if not at:  # it did not get as far as to a shape, and will not
                return faults | dict.fromkeys(pending, reason)
            faults[at[0]] = reason
            pending = pending[pending.index(at[0]) + 1 :]
        return faults


@contextmanager
def _told(index: int, emit: Emit) -> Iterator[None]:
    """A shape that the model refuses, or that memory does not hold, costs this shape alone."""
    try:
        yield
    except Moe3dError as error:
        emit({"done": index, "fault": str(error)})


def _wanted(outputs: Mapping[str, NDArray[Any]], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The named outputs, and which expert is strongest where the weights are there."""
    if missing := next((name for name in names if name not in outputs), None):
        raise Moe3dError(f"the model gives no output {missing!r}; export the bundle again")
    wanted = {name: outputs[name] for name in names}
    if "expert_weights" in outputs:
        wanted[parity_compare.EXPERTS] = parity_compare.strongest(outputs["expert_weights"])
    return wanted


def _file(folder: Path, index: int, name: str) -> Path:
    return folder / f"reference_{index}_{name}.npy"


def _one_line(text: str) -> str:
    return without_paths(" ".join(text.split()))
