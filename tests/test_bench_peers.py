"""What people would compare with: which cases they are, what they say where they cannot run, and what they run."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import exports
import onnx
import pytest
import torch
from bench_reports import ENVIRONMENT, a_case, a_report, a_round
from bundles import build_old, edit_manifest, write_bundle
from manifests import ENGINE, example_engine
from models import random_images, relative_error
from onnx import helper
from test_bench_run import SHAPES, a_source, as_json, least_ms

from moe3d_deploy.benchmarks.bench import peer_runners, peers
from moe3d_deploy.benchmarks.bench.cases import Planned, check_labels, plan_cases
from moe3d_deploy.benchmarks.bench.nodes import count_nodes
from moe3d_deploy.benchmarks.bench.peer_runners import CompiledRunner, WidespreadRunner, open_peer, widespread_file
from moe3d_deploy.benchmarks.bench.peers import plan_peers
from moe3d_deploy.benchmarks.bench.report import Report
from moe3d_deploy.benchmarks.bench.run import Options, run_cases
from moe3d_deploy.benchmarks.bench.runners import TorchRunner, infer, open_runner
from moe3d_deploy.bundle import add_engine
from moe3d_deploy.cli.bench import _PEERS
from moe3d_deploy.costs import total_flops
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.export.contract import DEFAULT_OUTPUTS
from moe3d_deploy.runtime.session import Session

NO_GPU = "the CUDA driver shows no GPU"


@pytest.fixture(autouse=True)
def a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler, without a GPU, whatever this one has."""
    monkeypatch.setattr(peers, "_torch_sees_gpu", lambda: False)
    monkeypatch.setattr(peers, "_without_gpu", lambda: NO_GPU)
    monkeypatch.setattr(peers, "_without_compiler", lambda on_gpu: None)


def rows(planned: list[Planned]) -> list[tuple[str, str, str, int, str | None]]:
    return [
        (item.source.kind, item.source.backend, item.source.precision, item.shape[1], item.missing) for item in planned
    ]


def test_peers_of_a_checkpoint_without_a_bundle() -> None:
    found = rows(plan_peers([a_source()], SHAPES))
    assert [row for row in found if row[4] is None] == [
        ("preset", "pytorch", "bf16", 1, None),
        ("preset", "pytorch", "bf16", 2, None),
        ("preset", "pytorch-compiled", "fp32", 1, None),
        ("preset", "pytorch-compiled", "fp32", 2, None),
        ("preset", "pytorch-compiled", "bf16", 1, None),
        ("preset", "pytorch-compiled", "bf16", 2, None),
        ("widespread", "onnxruntime-widespread", "fp32", 1, None),
        ("widespread", "onnxruntime-widespread", "fp32", 2, None),
    ]
    # What cannot run is one row, not one for every shape.
    assert [row for row in found if row[4] is not None] == [
        ("preset", "pytorch", "fp16", 1, "half in PyTorch is for GPUs, and PyTorch sees none here"),
        (
            "bundle", "onnxruntime", "fp32", 1,
            "no bundle of this model was named; make one: moe3d-export moe3d-tiny -o bundle",
        ),
    ]  # fmt: skip


def test_a_bundle_of_the_model_is_not_missing(tmp_path: Path) -> None:
    checkpoint, bundle = a_source(), of_bundle(tmp_path)
    found = plan_peers([checkpoint, bundle], SHAPES)
    assert not any("no bundle of this model" in (item.missing or "") for item in found)
    check_labels([*plan_cases([checkpoint, dataclasses.replace(bundle, precision="fp16")], SHAPES), *found])


def test_a_bundle_of_another_model_does_not_count(tmp_path: Path) -> None:
    other = dataclasses.replace(of_bundle(tmp_path), config=exports.MOE)
    found = plan_peers([a_source(), other], [(1, 1, 196, 252)])
    assert any("no bundle of this model was named" in (item.missing or "") for item in found)


def test_on_a_gpu_half_runs_and_is_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_torch_sees_gpu", lambda: True)
    found = {
        (item.source.backend, item.source.precision) for item in plan_peers([a_source()], SHAPES) if not item.missing
    }
    assert {("pytorch", "bf16"), ("pytorch", "fp16"), ("pytorch-compiled", "fp16")} <= found
    assert ("pytorch-compiled", "bf16") not in found


def test_options_of_the_source_reach_the_peers_that_have_them() -> None:
    source = a_source(options={"seed": 3, "view_chunk": 2, "allow_pickle": True, "plugin": "none"})
    found = {(item.source.backend, item.source.precision): item.source.options for item in plan_peers([source], SHAPES)}
    assert found["pytorch", "bf16"] == {**source.options, "precision": "bf16"}
    assert found["onnxruntime-widespread", "fp32"] == {"seed": 3, "allow_pickle": True}


def test_only_the_peers_that_are_asked_for(tmp_path: Path) -> None:
    both = [a_source(), of_bundle(tmp_path)]
    found = plan_peers(both, SHAPES, ["onnxruntime-widespread", "tensorrt"])
    assert [(item.source.backend, item.shape[1]) for item in found] == [
        ("onnxruntime-widespread", 1),
        ("onnxruntime-widespread", 2),
        ("tensorrt", 1),  # unavailable: one row
    ]
    everything = {item.source.backend for item in plan_peers(both, SHAPES)}
    assert everything == {*peers.OF_CHECKPOINT, *peers.OF_BUNDLE} == set(_PEERS)


def test_a_peer_that_no_source_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tensorrt is a peer of a bundle, and none is named"):
        plan_peers([a_source()], SHAPES, ["tensorrt"])
    with pytest.raises(InputError, match="pytorch-compiled is a peer of a checkpoint or preset, and none is named"):
        plan_peers([of_bundle(tmp_path)], SHAPES, ["pytorch-compiled"])


def of_bundle(folder: Path, **changes: Any) -> Any:
    """A bundle's source; the file in it is none that runs."""
    path = folder / "bundle"
    if not path.exists():
        write_bundle(path)
    return a_source(kind="bundle", backend="onnxruntime", precision="fp16", source=str(path), **changes)


def test_products_in_8_bits_run_nowhere_else(tmp_path: Path) -> None:
    source = of_bundle(tmp_path)
    edit_manifest(tmp_path / "bundle", precision="int8")
    planned = plan_peers([source], SHAPES)
    assert sorted((item.source.backend, item.missing) for item in planned) == [
        (backend, "int8 is for ONNX Runtime on a CPU") for backend in sorted(peers.OF_BUNDLE)
    ]


@pytest.mark.parametrize(("precision", "types"), [("fp16", {"float32"}), ("int8", {"float32", "int8"})])
def test_what_onnxruntime_computes_on_a_cpu(precision: str, types: set[str], tmp_path: Path) -> None:
    source = dataclasses.replace(of_bundle(tmp_path), precision=precision)
    work = Planned(source, SHAPES[0]).case(reason="it was not run").work
    assert work.keys() == types
    assert sum(work.values()) == total_flops(source.config, *SHAPES[0][1:], batch=SHAPES[0][0])


def test_peers_of_a_bundle_without_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_without_cuda_provider", lambda: "onnxruntime 1.0 is a build without CUDA")
    assert rows(plan_peers([of_bundle(tmp_path)], SHAPES)) == [
        ("bundle", "onnxruntime-cuda", "fp16", 1, "onnxruntime 1.0 is a build without CUDA"),
        *(
            (
                "bundle", builder, "fp16", 1,
                f"the bundle has no engine of {builder}; add one: moe3d-export bundle --builder {builder}",
            )
            for builder in ("tensorrt-rtx", "tensorrt")
        ),
    ]  # fmt: skip


def test_an_engine_runs_on_a_gpu_at_the_shapes_of_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = of_bundle(tmp_path)
    bundle = write_bundle(tmp_path / "bundle", overwrite=True)
    add_engine(bundle.path, example_engine(ENGINE), build_old)
    shapes = [(1, 4, 392, 518), (1, 16, 392, 518)]  # the profile has up to 8 views

    def engines() -> list[tuple[str, str, str, int, str | None]]:
        return [row for row in rows(plan_peers([source], shapes)) if row[1] == "tensorrt-rtx"]

    assert engines() == [("bundle", "tensorrt-rtx", "fp16", 4, NO_GPU)]
    monkeypatch.setattr(peers, "_without_gpu", lambda: None)
    assert engines() == [("bundle", "tensorrt-rtx", "fp16", 4, None)]
    (row,) = [item for item in plan_peers([source], shapes[1:]) if item.source.backend == "tensorrt-rtx"]
    assert row.missing == "it takes none of the shapes of this run"


def test_a_widespread_file_is_of_one_scene() -> None:
    found = plan_peers([a_source()], [(2, 1, 196, 252)])
    (row,) = [item for item in found if item.source.kind == "widespread"]
    assert row.missing == "it takes none of the shapes of this run"


@pytest.mark.parametrize(("on_gpu", "variable", "usual"), [(False, "CXX", "g++"), (True, "CC", "gcc")])
def test_without_a_compiler_nothing_is_compiled(
    on_gpu: bool, variable: str, usual: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.reload(peers)._without_compiler  # the fixture has replaced it
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    said = "torch.compile needs a compiler, and {} is not installed: install it, or name another in " + variable
    assert real(on_gpu) == said.format(usual)
    monkeypatch.setenv(variable, "some-compiler -O2")
    assert real(on_gpu) == said.format("some-compiler -O2")
    compiler = tmp_path / "some-compiler"
    compiler.touch(mode=0o755)
    assert real(on_gpu) is None


def test_a_peer_that_cannot_run_is_a_case_with_its_reason_and_is_not_tried() -> None:
    asked = []

    def measure(request: dict[str, Any], on_event: Any) -> dict[str, Any]:
        asked.append(request["backend"])
        return {**as_json(2 * least_ms(1)), "nodes": 1234 if request["backend"] == "onnxruntime-widespread" else None}

    shapes = SHAPES[:1]
    planned = [*plan_cases([a_source()], shapes), *plan_peers([a_source()], shapes)]
    planned = [item for item in planned if item.source.precision != "bf16"]  # has ceilings of its own
    report = run_cases(planned, Options(processes=2), environment=ENVIRONMENT, measure=measure)
    by = {(case.backend, case.precision): case for case in report.cases}
    lost = by["pytorch", "fp16"]
    assert (lost.status, lost.rounds) == ("unavailable", ())
    assert lost.reason == "half in PyTorch is for GPUs, and PyTorch sees none here"
    assert by["onnxruntime", "fp32"].status == "unavailable"
    assert asked == ["pytorch", "pytorch-compiled", "onnxruntime-widespread"] * 2
    assert by["onnxruntime-widespread", "fp32"].nodes == 1234
    assert by["pytorch", "fp32"].nodes is None
    again = Report.from_json(report.to_json(), "report.json")
    assert again == report


def test_a_report_without_the_keys_of_peers_reads_as_before() -> None:
    with_both = a_report(a_case([a_round(first_run_seconds=4.5)], nodes=20_664))
    assert Report.from_json(with_both.to_json(), "report.json") == with_both
    assert b'"nodes": 20664' in with_both.to_json()
    assert b'"first_run_seconds": 4.5' in with_both.to_json()
    old = a_report(a_case()).to_json()
    assert b"nodes" not in old
    assert b"first_run_seconds" not in old
    (case,) = Report.from_json(old, "report.json").cases
    assert (case.nodes, case.rounds[0].first_run_seconds) == (None, None)
    assert Report.from_json(old, "report.json").to_json() == old


def test_an_unavailable_case_needs_its_reason() -> None:
    lost = a_case(status="unavailable", reason="no GPU")
    data = json.loads(a_report(dataclasses.replace(lost, rounds=())).to_json())
    assert Report.from_json(json.dumps(data).encode(), "x").cases[0].status == "unavailable"
    data["sections"]["cases"]["cases"][0]["reason"] = None
    with pytest.raises(Moe3dError, match="reason must be that of a case not measured"):
        Report.from_json(json.dumps(data).encode(), "x")


def small_runner(backend: str = "pytorch", **options: Any) -> Any:
    runner = open_runner(backend, str(exports.checkpoint()), threads=1, options=options)
    runner.load()
    return runner


def test_the_bf16_peer_has_bf16_weights_where_the_policy_puts_them() -> None:
    """By the exporter's policy: transformer blocks, and not the camera head. Its depth is off by rounding, not more."""
    runner = small_runner(precision="bf16")
    assert isinstance(runner, TorchRunner)
    types = {name: tensor.dtype for name, tensor in runner._loaded().named_parameters()}
    expected = {name: tensor.dtype for name, tensor in exports.load("bf16", ("point_map",)).named_parameters()}
    assert types == expected
    blocks = {kind for name, kind in types.items() if "blocks" in name and name.endswith("qkv.weight")}
    assert blocks == {torch.bfloat16}
    assert {kind for name, kind in types.items() if name.startswith("camera_head")} == {torch.float32}
    assert runner.weights_bytes() < small_runner().weights_bytes()
    images = random_images(1, 2, 3, 28, 42).numpy()
    found, exact = infer(runner, images)[1], infer(small_runner(), images)[1]
    assert 1e-5 < relative_error(found["depth"], exact["depth"]) < 5e-2  # bf16 keeps 8 bits: 4e-3 a step


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++, which is not installed")
def test_a_compiled_model_gives_what_the_eager_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # what the runner sets goes with the test
    torch._dynamo.reset()
    images = random_images(1, 2, 3, 28, 42).numpy()
    runner = small_runner("pytorch-compiled", plugin="none")
    assert isinstance(runner, CompiledRunner)
    first = infer(runner, images)[1]
    eager = infer(small_runner(plugin="none"), images)[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
    assert first.keys() == eager.keys()
    for name, values in eager.items():
        assert relative_error(first[name], values) < 1e-4, name  # sums in another order


def test_what_cannot_be_compiled_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = open_peer(
        "pytorch-compiled", str(exports.checkpoint()),
        threads=1, options={"plugin": "none"}, types=("float32",), size=(28, 42), workdir=None,
    )  # fmt: skip

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no such kernel\nin some file")

    monkeypatch.setattr(torch, "compile", lambda model, **options: fail)
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    runner.load()
    with pytest.raises(Moe3dError) as caught:
        runner.compute(torch.zeros(1, 1, 3, 28, 42))
    assert str(caught.value) == "torch.compile failed: no such kernel"


def test_the_widespread_peer_exports_once_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def here(function: str, request: dict[str, Any], *, title: str) -> None:
        module, _, name = function.partition(":")
        calls.append(request["height"])
        getattr(importlib.import_module(module), name)(request, lambda event: None)

    monkeypatch.setattr(peer_runners, "run_in_child", here)
    source, images = str(exports.checkpoint()), random_images(1, 3, 3, 28, 42).numpy()
    for _ in range(2):
        runner = open_runner(
            "onnxruntime-widespread", source, threads=1, options={}, size=(28, 42), workdir=str(tmp_path)
        )
    assert calls == [28]
    assert [item.name for item in tmp_path.iterdir()] == ["small-28x42"]
    assert isinstance(runner, WidespreadRunner)
    runner.load()
    found, expected = infer(runner, images)[1], Session.open(source).run(images)
    assert set(found) == set(DEFAULT_OUTPUTS)
    for name in found:
        assert relative_error(found[name], expected[name]) < 1e-4, name
    file = tmp_path / "small-28x42" / "model.onnx"
    assert runner.nodes() == count_nodes(file) > 1000
    assert runner.weights_bytes() == sum(item.stat().st_size for item in file.parent.iterdir())


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(function: str, request: dict[str, Any], *, title: str) -> None:
        (Path(request["folder"]) / "half").touch()
        raise Moe3dError("the widespread export was killed")

    monkeypatch.setattr(peer_runners, "run_in_child", die)
    with pytest.raises(Moe3dError, match="was killed"):
        widespread_file("moe3d-tiny", {}, (28, 42), tmp_path)
    assert not list(tmp_path.iterdir())


def test_nodes_of_functions_and_of_inner_graphs_are_counted(tmp_path: Path) -> None:
    """Two calls of a function of three nodes, one of which calls a function of two; an If of 1 and 2: 2 x 4 + 1 + 3."""

    def node(kind: str, domain: str = "", **attributes: Any) -> Any:
        return helper.make_node(kind, ["x"], ["x"], domain=domain, **attributes)

    def function(name: str, *nodes: Any) -> Any:
        return helper.make_function("own", name, ["x"], ["x"], nodes, [helper.make_opsetid("", 18)])

    def graph(*nodes: Any) -> Any:
        value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
        return helper.make_graph(nodes, "g", [value], [value])

    inner = function("Inner", node("Exp"), node("Log"))
    outer = function("Outer", node("Abs"), node("Inner", "own"), node("Neg"))
    branches = node("If", then_branch=graph(node("Abs")), else_branch=graph(node("Abs"), node("Neg")))
    model = helper.make_model(graph(node("Outer", "own"), branches, node("Outer", "own")), functions=[inner, outer])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert count_nodes(tmp_path / "m.onnx") == 2 * 4 + 1 + 3
