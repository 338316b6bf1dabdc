"""Runners of `moe3d bench` are the backends of `moe3d run`, and ceilings are measured in their libraries."""

import exports
import numpy as np
import pytest
import sessions
from numpy.typing import NDArray

from moe3d_deploy.benchmarks.bench import ceilings as module
from moe3d_deploy.benchmarks.bench.ceilings import onnxruntime_ceilings, torch_ceilings
from moe3d_deploy.benchmarks.bench.runners import Runner, infer, open_runner
from moe3d_deploy.benchmarks.timing import Effort

ONCE = Effort(min_runs=1, max_runs=1, budget_ms=0, warmup_budget_ms=0)


def runner_of(backend: str) -> Runner:
    source = exports.bundle().path if backend == "onnxruntime" else exports.checkpoint()
    runner = open_runner(backend, str(source), threads=1, options={})
    runner.load()
    return runner


def images() -> NDArray[np.float32]:
    return sessions.images(2, 2, 2, 3)


@pytest.mark.parametrize("backend", ["pytorch", "onnxruntime"])
def test_a_runner_gives_the_bits_of_the_session(backend: str) -> None:
    session = sessions.of_bundle() if backend == "onnxruntime" else sessions.of_checkpoint()
    _, outputs = infer(runner_of(backend), images())
    expected = session.run(images())
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(outputs[name], value)


@pytest.mark.parametrize("backend", ["pytorch", "onnxruntime"])
def test_a_runner_knows_what_it_is(backend: str) -> None:
    runner = runner_of(backend)
    assert (runner.threads, runner.input_type, runner.cuda_graph) == (1, "float32", False)
    assert "model" in runner.stages


def test_weights_are_those_that_are_held() -> None:
    """PyTorch: the state dict's tensors, and some buffers beside. ONNX Runtime: the bundle's file with its data."""
    state = exports.load(outputs=("point_map",)).state_dict()
    in_torch = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert runner_of("pytorch").weights_bytes() == pytest.approx(in_torch, rel=0.01)
    folder = exports.bundle().path
    in_file = sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert runner_of("onnxruntime").weights_bytes() == in_file


def test_activations_are_known_where_the_allocator_tells() -> None:
    allocated = runner_of("pytorch").allocated_bytes(images())
    assert allocated is not None
    assert allocated > images().nbytes
    assert runner_of("onnxruntime").allocated_bytes(images()) is None


@pytest.mark.parametrize("library", ["pytorch", "onnxruntime"])
def test_ceilings_are_rates_of_what_was_done(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a millisecond for everything: 2 x 64 KiB copied, 2 x 64^3 and 2 x 9 x 4^2 x 8^2 FLOP, each in that."""
    monkeypatch.setattr(module, "_COPY_BYTES", 64 << 10)
    monkeypatch.setattr(module, "_CPU_SIDES", (32, 64))
    monkeypatch.setattr(module, "_CPU_MAPS", ((4, 8),))
    ran = []

    def fastest(timer: module.Timer, effort: Effort) -> float:
        ran.append(timer())
        return 1e-3

    monkeypatch.setattr(module, "_fastest", fastest)
    found = torch_ceilings("cpu") if library == "pytorch" else onnxruntime_ceilings(1)
    assert found.copy_bytes_per_second == pytest.approx(2 * (64 << 10) / 1e-3)
    rates = found.flops_per_second["float32"]
    assert rates.matmul == pytest.approx(2 * 64**3 / 1e-3)
    assert rates.convolution == pytest.approx(2 * 9 * 4**2 * 8**2 / 1e-3)
    assert len(ran) == 4
    assert min(ran) > 0


def test_products_in_8_bits_have_a_ceiling_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COPY_BYTES", 64 << 10)
    monkeypatch.setattr(module, "_CPU_SIDES", (32, 64))
    monkeypatch.setattr(module, "_CPU_MAPS", ((4, 8),))
    monkeypatch.setattr(module, "_fastest", lambda timer, effort: timer() and 1e-3)
    found = onnxruntime_ceilings(1, types=("float32", "int8")).flops_per_second
    assert list(found) == ["float32", "int8"]
    assert (found["int8"].matmul, found["int8"].convolution) == (pytest.approx(2 * 64**3 / 1e-3), 0)


def test_the_fastest_run_is_the_ceiling() -> None:
    times = iter([5.0, 9.0, 2.0, 7.0])
    effort = Effort(min_runs=3, max_runs=3, warmup_budget_ms=0)
    assert module._fastest(lambda: next(times), effort) == 2e-3
