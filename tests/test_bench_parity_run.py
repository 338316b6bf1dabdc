"""Parity from the models to the report: planted faults are found and named, and what dies costs no more than itself."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import pytest
import variants
from bench_reports import die
from bundles import edit_manifest
from faulty_weights import with_overflow
from parities import in_process

from moe3d_deploy.benchmarks.bench import parity_run
from moe3d_deploy.benchmarks.bench.parity import COMPARED, FAILED, LEFT_OUT, NOT_RUN, Parity, faults
from moe3d_deploy.benchmarks.bench.parity_models import Opened, open_model
from moe3d_deploy.benchmarks.bench.parity_plan import ParityPlan, plan_parity
from moe3d_deploy.benchmarks.bench.parity_run import run_parity
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.bundle_files import entry_of
from moe3d_deploy.child import Emit
from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.export.source import SourceSpec

Shape = tuple[int, int, int, int]
SHAPES: list[Shape] = [(1, 2, 28, 42), (2, 1, 42, 28), (1, 9, 14, 14)]
FP32, FP16, BF16 = 0, 1, 2  # places of the variants in PyTorch


def a_plan(bundles: Sequence[Path] = (), shapes: Sequence[Shape] = SHAPES) -> ParityPlan:
    return plan_parity(SourceSpec(str(exports.checkpoint())), [str(path) for path in bundles], shapes)


def only(plan: ParityPlan, *places: int) -> ParityPlan:
    return dataclasses.replace(plan, variants=tuple(plan.variants[i] for i in places))


def as_reference(plan: ParityPlan) -> ParityPlan:
    """One variant, which is the reference itself."""
    lying = dataclasses.replace(plan.variants[FP32], model=plan.reference_model)
    return dataclasses.replace(plan, variants=(lying,))


def at_work(plan: ParityPlan, measure: Any = in_process, **options: Any) -> Parity:
    return run_parity(plan, measure=measure, **options)


def test_a_small_model_is_compared_with_itself_in_float64() -> None:
    parity = at_work(a_plan())
    assert (parity.reference, parity.device, parity.sha256) == ("fp64", "cpu", None)
    assert [variant.precision for variant in parity.variants] == ["fp32", "fp16", "bf16"]
    assert all(variant.status == COMPARED and len(variant.cells) == 3 for variant in parity.variants)
    assert parity.sound, [faults(parity, variant) for variant in parity.variants]
    assert [item.images for item in parity.inputs] == [
        "scenes of test-seeds, seed 0", "scenes of test-seeds, seed 100..101", "smooth random images, seed 200"
    ]  # fmt: skip
    for i in range(3):  # half rounds to 11 bits, bfloat16 to 8, float32 to 24
        single, half, brain = (variant.cells[i].found.errors["depth"].max for variant in parity.variants)  # type: ignore[union-attr]
        assert 0 < single < 1e-5 < half < brain
        assert parity.variants[FP16].cells[i].found.experts_agree > 0.9  # type: ignore[union-attr,operator]


def test_a_large_model_is_compared_with_itself_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe3d_deploy.benchmarks.bench.parity_plan.LARGEST_IN_FLOAT64", 1000)
    plan = a_plan()
    assert plan.reference == plan.reference_model["precision"] == "fp32"
    assert [variant.precision for variant in plan.variants] == ["fp16", "bf16"]


def test_a_variant_that_is_the_reference_differs_in_nothing() -> None:
    (variant,) = at_work(as_reference(a_plan())).variants
    for cell in variant.cells:
        assert cell.found is not None
        assert {x for error in cell.found.errors.values() for x in dataclasses.astuple(error)} == {0.0}
        assert (cell.found.abs_rel, cell.found.rotation_deg, cell.found.experts_agree) == (0, 0, 1)
        assert cell.found.boundary_f1 in (None, 1)


def test_a_fault_in_one_output_at_one_shape_is_found_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(model: Any) -> Opened:
        device, run = open_model(model)

        def faulty(pixels: Any) -> Any:
            outputs = dict(run(pixels))
            if model["precision"] == "fp16" and pixels.shape[:2] == (2, 1):
                outputs["depth_conf"] = outputs["depth_conf"].copy()
                outputs["depth_conf"][1, 0, 3, 4] *= 2
            return outputs

        return Opened(device, faulty)

    monkeypatch.setattr(parity_run, "open_model", opened)
    parity = at_work(only(a_plan(), FP32, FP16))
    assert faults(parity, parity.variants[0]) == []
    ((shape, text),) = faults(parity, parity.variants[1])
    assert shape == (2, 1, 42, 28)
    assert text.startswith("depth_conf is off by ")
    assert not parity.sound


def test_an_overflow_of_sixteen_bits_shows_on_a_cpu(tmp_path: Path) -> None:
    spec = with_overflow(tmp_path, "aggregator.global_blocks.0")
    parity = at_work(only(plan_parity(spec, [], [(1, 1, 28, 42)]), FP32, FP16, BF16))
    assert [bool(faults(parity, variant)) for variant in parity.variants] == [False, True, False]
    found = parity.variants[FP16].cells[0].found
    assert found is not None
    assert (found.errors["depth"].max, found.abs_rel) == (None, None)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of a float32 bundle of 8-bit pixels with every output."""
    return shutil.copytree(variants.pixels().path, tmp_path / "copied")


def test_a_bundle_is_compared_in_every_output_that_it_has(bundle: Path) -> None:
    plan = a_plan([bundle], SHAPES[:2])
    parity = at_work(only(plan, 3, 4, 5))
    in_runtime, *engines = parity.variants
    assert (in_runtime.label, in_runtime.device) == ("onnxruntime fp32 copied", "cpu")
    assert faults(parity, in_runtime) == []
    found = in_runtime.cells[0].found
    assert found is not None
    assert {"world_points", "point_map", "expert_weights", "pose_enc"} <= found.errors.keys()
    assert found.experts_agree == pytest.approx(1, abs=1e-3)
    assert parity.sha256 == Bundle.open(bundle).manifest.checkpoint.sha256
    for builder, variant in zip(("tensorrt", "tensorrt-rtx"), engines, strict=True):
        assert (variant.backend, variant.status, variant.cells) == (builder, NOT_RUN, ())
        assert variant.reason == "the bundle has no such engine"


def test_a_bundle_whose_weights_were_changed_is_found(bundle: Path) -> None:
    """A weight of the depth head, by a tenth; the digest is made right again, as nobody would."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    tensor = max(
        (t for t in model.graph.initializer if "depth_head" in t.name and t.external_data),
        key=lambda t: np.prod(t.dims),
    )
    place = {entry.key: entry.value for entry in tensor.external_data}
    values = np.memmap(bundle / "model.onnx.data", np.float32, "r+", int(place["offset"]), (int(np.prod(tensor.dims)),))
    values *= np.float32(1.1)
    values.flush()
    manifest = Bundle.open(bundle, verify="sizes").manifest
    files = {name: dataclasses.asdict(entry) for name, entry in manifest.files.items()}
    edit_manifest(bundle, files={**files, "model.onnx.data": dataclasses.asdict(entry_of(bundle / "model.onnx.data"))})
    parity = at_work(only(a_plan([bundle], SHAPES[:2]), 3))
    wrong = faults(parity, parity.variants[0])
    assert {shape for shape, _ in wrong} == set(SHAPES[:2])
    assert any(text.startswith("depth is off by") for _, text in wrong)
    assert not any(text.startswith("extrinsics") for _, text in wrong)


def test_a_shape_that_a_bundle_does_not_take_is_left_out(bundle: Path) -> None:
    ranges = dataclasses.asdict(Bundle.open(bundle).manifest.shape_ranges)
    edit_manifest(bundle, shape_ranges={**ranges, "views": {"min": 2, "max": 2, "step": 1}})
    parity = at_work(only(a_plan([bundle], SHAPES[:2]), 3))
    (variant,) = parity.variants
    assert [cell.status for cell in variant.cells] == [COMPARED, LEFT_OUT]
    assert variant.cells[1].reason == "not in the bundle's range"
    assert parity.sound
    parity = at_work(only(a_plan([bundle], SHAPES[1:2]), 3))
    assert (parity.variants[0].status, parity.variants[0].reason) == (NOT_RUN, "not in the bundle's range")


class Recorded:
    """A measurement in which the process of a model dies at a shape, for `deaths` of (precision, index)."""

    def __init__(self, *deaths: tuple[str, int]) -> None:
        self.deaths = deaths
        self.asked: list[tuple[str, list[int]]] = []

    def __call__(self, function: str, request: dict[str, Any], on_event: Emit) -> None:
        precision = request.get("model", {}).get("precision", "images")
        self.asked.append((precision, list(request["indices"])))
        if (precision, -1) in self.deaths:
            raise Moe3dError("the process was killed; free some of /mnt/big/memory")
        living = [i for i in request["indices"] if (precision, i) not in self.deaths]
        dead = [i for i in request["indices"] if i not in living]
        before = [i for i in living if not dead or i < dead[0]]
        in_process(function, {**request, "indices": before}, on_event)
        if dead:
            on_event({"step": dead[0]})
            raise Moe3dError("the process was killed; free some of /mnt/big/memory")


def test_a_process_that_dies_costs_one_shape_and_another_goes_on() -> None:
    measure = Recorded(("fp16", 1))
    parity = at_work(only(a_plan(), FP16, FP32), measure)
    half, single = parity.variants
    assert [cell.status for cell in half.cells] == [COMPARED, FAILED, COMPARED]
    assert half.cells[1].reason == "the process was killed; free some of memory"  # no path
    assert [cell.status for cell in single.cells] == [COMPARED] * 3
    assert [indices for precision, indices in measure.asked if precision == "fp16"] == [[0, 1, 2], [2]]
    assert not parity.sound


def test_a_model_that_does_not_load_is_tried_once() -> None:
    measure = Recorded(("fp16", -1))
    half, single = at_work(only(a_plan(), FP16, FP32), measure).variants
    assert (half.status, half.reason) == (FAILED, "the process was killed; free some of memory")
    assert [precision for precision, _ in measure.asked].count("fp16") == 1
    assert single.status == COMPARED


def test_where_the_reference_did_not_run_nothing_is_compared() -> None:
    parity = at_work(only(a_plan(), FP32), Recorded(("fp64", 0)))
    assert parity.inputs[0].reference == "the process was killed; free some of memory"
    assert [cell.status for cell in parity.variants[0].cells] == [LEFT_OUT, COMPARED, COMPARED]
    assert not parity.sound


def test_a_shape_that_a_model_refuses_costs_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(model: Any) -> Opened:
        device, run = open_model(model)

        def refusing(pixels: Any) -> Any:
            if model["precision"] == "fp32" and pixels.shape[1] == 1:
                raise Moe3dError("ONNX Runtime failed; try fewer views")
            return run(pixels)

        return Opened(device, refusing)

    monkeypatch.setattr(parity_run, "open_model", opened)
    measure = Recorded()
    (single,) = at_work(only(a_plan(), FP32), measure).variants
    assert [cell.status for cell in single.cells] == [COMPARED, FAILED, COMPARED]
    assert single.cells[1].reason == "ONNX Runtime failed; try fewer views"
    assert [precision for precision, _ in measure.asked] == ["images", "fp64", "fp32"]


def test_an_interrupt_keeps_what_was_finished_and_leaves_no_file() -> None:
    folders: list[Path] = []
    kept: list[Parity] = []

    def measure(function: str, request: dict[str, Any], on_event: Emit) -> None:
        folders.append(Path(request["folder"]))
        if request.get("model", {}).get("precision") == "fp16":
            in_process(function, {**request, "indices": request["indices"][:1]}, on_event)
            assert list(folders[0].glob("reference_2_depth.npy"))
            raise KeyboardInterrupt
        in_process(function, request, on_event)

    with pytest.raises(KeyboardInterrupt):
        at_work(only(a_plan(), FP32, FP16), measure, keep=kept.append)
    assert not folders[0].exists()
    assert [len(variant.cells) for variant in kept[-1].variants] == [3, 1]


def test_in_processes_of_its_own_it_gives_the_same() -> None:
    plan = as_reference(a_plan(shapes=SHAPES[:1]))
    told: list[tuple[str, str]] = []
    parity = run_parity(plan, tell=lambda what, shape: told.append((what, shape)))
    assert parity == at_work(plan)
    assert told == [(what, "1x2x28x42") for what in ("images", "reference fp64", "pytorch fp32 small")]


def test_a_child_that_is_killed_is_an_entry() -> None:
    def measure(function: str, request: dict[str, Any], on_event: Emit) -> None:
        if request.get("model", {}).get("precision") == "fp32":
            parity_run.in_child(f"{die.__module__}:die", request, on_event)
        in_process(function, request, on_event)

    (variant,) = at_work(only(a_plan(shapes=SHAPES[:1]), FP32), measure).variants
    assert variant.status == FAILED
    assert variant.reason is not None
    assert variant.reason.startswith("the process was killed; the machine probably ran out of memory")
