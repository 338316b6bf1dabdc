"""One case of `moe3d bench`: stages, fresh inputs, memory, the machine's state, and times that cannot be true."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_reports import CEILINGS, a_round
from numpy.typing import NDArray

from moe3d_deploy import costs
from moe3d_deploy.benchmarks.bench import runners
from moe3d_deploy.benchmarks.bench.ceilings import best
from moe3d_deploy.benchmarks.bench.inputs import FreshImages, FreshPhotographs, comes_from_photographs
from moe3d_deploy.benchmarks.bench.measure import measure
from moe3d_deploy.benchmarks.bench.plausible import findings, reason
from moe3d_deploy.benchmarks.bench.process_memory import HostMemory
from moe3d_deploy.benchmarks.bench.report import Ceilings, Rates, Round
from moe3d_deploy.benchmarks.bench.runners import infer
from moe3d_deploy.benchmarks.bench.state import machine_state, parse_smi
from moe3d_deploy.benchmarks.timing import Effort
from moe3d_deploy.config import PRESETS
from moe3d_deploy.image_decode import decode_image
from moe3d_deploy.images import Fitting, fit
from moe3d_deploy.manifest import Preprocessing

SHAPE = (2, 2, 28, 42)
WORK = costs.flops_by_type(PRESETS["moe3d-tiny"], SHAPE, costs.all_float32)
EFFORT = Effort(min_runs=4, max_runs=4, warmup_budget_ms=0)
FIT = Preprocessing.of(PRESETS["moe3d-tiny"])
# What a run of WORK takes at the least: 20 ms.
RATES = Ceilings(10e9, {"float32": Rates(WORK["float32"] / 0.02, 1.0)})


class FakeClock:
    """A clock that the runner moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def milliseconds(self, begin: float, end: float) -> float:
        return end - begin


class FakeRunner:
    """Takes 1 ms to upload, 25 ms in the model and 2 ms to download, on a clock of its own."""

    stages: tuple[str, ...] = ("upload", "model", "download")
    threads, cuda_graph, device, input_type = 1, False, "cpu", "float32"

    def __init__(self) -> None:
        self.clock: Any = FakeClock()
        self.seen: list[NDArray[Any]] = []

    def load(self) -> None: ...

    def upload(self, images: NDArray[Any]) -> Any:
        self.clock.now += 1
        self.seen.append(images.copy())
        return images

    def compute(self, images: Any) -> Any:
        self.clock.now += 25
        return images

    def download(self, images: Any) -> dict[str, NDArray[Any]]:
        self.clock.now += 2
        batch, views, _, height, width = images.shape
        depth = 1 + np.zeros((batch, views, height, width), np.float32)
        cameras = np.tile(np.eye(3, 4, dtype=np.float32), (batch, views, 1, 1))
        intrinsics = np.tile(np.array([[40, 0, 20], [0, 40, 14], [0, 0, 1]], np.float32), (batch, views, 1, 1))
        return {"depth": depth, "depth_conf": depth, "extrinsics": cameras, "intrinsics": intrinsics}

    def weights_bytes(self) -> int:
        return 1000

    def allocated_bytes(self, images: NDArray[Any]) -> int | None:
        return 2000

    def device_memory(self) -> None: ...

    def ceilings(self) -> Ceilings:
        return RATES


def measured(runner: Any, pipeline_runs: int = 0) -> Round:
    return measure(runner, SHAPE, FIT, seed=0, effort=EFFORT, pipeline_runs=pipeline_runs)


def test_every_stage_has_the_time_between_its_marks() -> None:
    found = measured(FakeRunner())
    assert found.series["upload"] == (1.0,) * 4
    assert found.series["model"] == (25.0,) * 4
    assert found.series["download"] == (2.0,) * 4
    assert (found.warmup_runs, found.stable) == (1, False)  # no budget for more
    assert found.memory.activations_bytes == 2000
    assert found.memory.activations_by == "allocator"


def test_steps_that_a_backend_does_not_have_are_no_stages() -> None:
    runner = FakeRunner()
    runner.stages = ("model",)
    assert set(measured(runner).series) == {"model", "inference"}


def test_no_two_runs_see_the_same_images() -> None:
    runner = FakeRunner()
    measured(runner)
    assert len(runner.seen) == 1 + 1 + 4  # the first run, the warm-up, the runs
    for i, images in enumerate(runner.seen):
        assert not any(np.array_equal(images, other) for other in runner.seen[:i])


def test_a_true_time_is_plausible() -> None:
    """25 ms where 20 are needed."""
    assert list(findings(a_round((25.0, 25.0), ceilings=RATES), WORK, 1000)) == []


def test_a_timer_that_does_not_wait_for_the_model_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model goes on in the background, as on a GPU: without waiting for it its stage takes a tenth of a
    millisecond, and the download the rest. The whole, whose outputs are there, is true."""

    class Unsynchronised(FakeRunner):
        def compute(self, images: Any) -> Any:
            self.clock.now += 0.1
            return images

        def download(self, images: Any) -> dict[str, NDArray[Any]]:
            self.clock.now += 24.9
            return super().download(images)

    runner = Unsynchronised()
    monkeypatch.setattr(runners, "HostClock", lambda: runner.clock)
    found = measured(runner)
    assert found.series["inference"] == (28.0,) * 4
    (finding,) = findings(found, WORK, 1000)
    assert (finding.stage, finding.kind) == ("model", "compute")
    assert finding.ceiling == pytest.approx(WORK["float32"] / 0.02)
    assert finding.reached > finding.ceiling
    assert "model: " in reason(finding)
    assert "GFLOP/s, and the fastest product or convolution here reached" in reason(finding)


def test_a_whole_that_is_too_short_is_caught() -> None:
    item = a_round((25.0,), series={"model": (25.0,), "inference": (19.0,)}, ceilings=RATES)
    assert [(found.stage, found.kind) for found in findings(item, WORK, 1000)] == [("inference", "compute")]


def test_no_time_at_all_is_caught_too() -> None:
    item = a_round((25.0,), series={"model": (0.0,), "inference": (25.0,)}, ceilings=RATES)
    assert [found.stage for found in findings(item, WORK, 1000)] == ["model"]


def test_types_are_held_to_their_own_ceilings() -> None:
    """1 GFLOP at 100 and 1 at 50 GFLOP/s take 30 ms; 29 are too few, 31 are not. The faster of matmul and convolution
    counts."""
    rates = {"float16": Rates(100e9, 1.0), "float32": Rates(1.0, 50e9)}
    work = {"float16": 10**9, "float32": 10**9}
    for milliseconds, kinds in ((29.0, ["compute", "compute"]), (31.0, [])):
        item = a_round((milliseconds,), ceilings=Ceilings(10e9, rates))
        assert [found.kind for found in findings(item, work, 1000)] == kinds


def test_weights_cannot_be_read_faster_than_they_can_be_copied() -> None:
    """4 GB at 10 GB/s take 400 ms. What fits into a cache is not held to that."""
    item = a_round((390.0,), ceilings=CEILINGS)
    assert [found.kind for found in findings(item, {"float32": 1}, 4 * 10**9)] == ["memory", "memory"]
    assert "weights at 10.3 GB/s, and the fastest copy here reached 10.0" in reason(
        next(findings(item, {"float32": 1}, 4 * 10**9))
    )
    assert list(findings(a_round((410.0,), ceilings=CEILINGS), {"float32": 1}, 4 * 10**9)) == []
    assert list(findings(a_round((0.001,), ceilings=CEILINGS), {"float32": 1}, 10**6)) == []


def test_the_best_ceiling_of_two_counts() -> None:
    a = Ceilings(1.0, {"float32": Rates(5.0, 2.0)})
    b = Ceilings(3.0, {"float32": Rates(4.0, 6.0)})
    assert best(a, b) == Ceilings(3.0, {"float32": Rates(5.0, 6.0)})


def test_the_way_from_files_to_files_has_all_its_stages() -> None:
    found = measured(FakeRunner(), pipeline_runs=2)
    assert found.pipeline is not None
    assert set(found.pipeline) == {"decode", "preprocess", "inference", "post", "whole"}
    assert {len(times) for times in found.pipeline.values()} == {2}
    for i, whole in enumerate(found.pipeline["whole"]):
        parts = sum(times[i] for name, times in found.pipeline.items() if name != "whole")
        assert parts == pytest.approx(whole, abs=0.01)
    assert found.photographs == "JPEG files of 84x56, in memory"


def test_views_higher_than_wide_come_from_no_photograph() -> None:
    found = measure(FakeRunner(), (1, 1, 42, 28), FIT, seed=0, effort=EFFORT, pipeline_runs=2)
    assert found.pipeline is None
    assert found.photographs is None


@pytest.mark.parametrize(
    ("mode", "height", "width", "comes"),
    [("crop", 28, 42, True), ("crop", 42, 42, True), ("crop", 42, 28, False), ("pad", 42, 42, True),
     ("pad", 28, 42, False)],
)  # fmt: skip
def test_photographs_become_views_of_the_shape(mode: Any, height: int, width: int, comes: bool) -> None:
    preprocessing = Preprocessing(mode, width, 14, FIT.mean, FIT.std, FIT.layout)
    shape = (1, 1, height, width)
    assert comes_from_photographs(shape, preprocessing) == comes
    ((file,),) = FreshPhotographs(shape, 0).next()
    pixels, _ = fit(decode_image(file, "x", "apply"), "x", "x", Fitting(mode, width, 14))
    assert (pixels.shape[:2] == (height, width)) == comes


@pytest.mark.parametrize(("kind", "shape"), [("float32", (2, 2, 3, 28, 42)), ("uint8", (2, 2, 28, 42, 3))])
def test_images_are_what_the_model_takes(kind: str, shape: tuple[int, ...]) -> None:
    images = FreshImages(SHAPE, kind, 0)
    first, second = images.next(), images.next()
    assert first.shape == shape
    assert first.dtype == kind
    assert not np.shares_memory(first, second)
    assert first.max() <= (255 if kind == "uint8" else 1)
    assert np.array_equal(FreshImages(SHAPE, kind, 0).next(), first)


def test_memory_is_what_comes_on_top(tmp_path: Path) -> None:
    """In kB: 1000 before; 3000 at most and 2500 in the end of loading, 100 of it of files; the first run has 4000 at
    most and reads 700 more of the file: 1500 - 700 are tensors. A later run has 4500."""

    def now(resident: int, files: int, peak: int) -> None:
        lines = {"VmHWM": peak, "VmRSS": resident, "RssFile": files}
        (tmp_path / "status").write_text("".join(f"{key}:\t{value} kB\n" for key, value in lines.items()))

    now(1000, 0, 1000)
    memory = HostMemory(tmp_path)
    now(2500, 100, 3000)
    memory.after_load()
    assert (tmp_path / "clear_refs").read_text() == "5"
    now(3200, 800, 4000)
    memory.after_first_run()
    now(3200, 800, 4500)
    assert memory.figures() == {
        "before_bytes": 1000 * 1024,
        "load_peak_bytes": 2000 * 1024,
        "run_peak_bytes": 3500 * 1024,
        "peak_bytes": 3500 * 1024,
        "anonymous_bytes": 800 * 1024,
    }


def test_where_the_peak_cannot_be_reset_the_runs_have_none_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "clear_refs").mkdir()  # cannot be written
    (tmp_path / "status").write_text("VmHWM:\t10 kB\nVmRSS:\t10 kB\nRssFile:\t0 kB\n")
    memory = HostMemory(tmp_path)
    memory.after_load()
    memory.after_first_run()
    (tmp_path / "status").write_text("VmHWM:\t30 kB\nVmRSS:\t10 kB\nRssFile:\t0 kB\n")
    found = memory.figures()
    assert (found["run_peak_bytes"], found["anonymous_bytes"], found["peak_bytes"]) == (None, None, 20 * 1024)


def test_memory_that_a_run_takes_is_seen() -> None:
    """The kernel's own figures: 64 MiB that are there in the first run alone."""
    memory = HostMemory()
    memory.after_load()
    held = np.ones(64 << 17)
    del held
    memory.after_first_run()
    found = memory.figures()
    assert found["peak_bytes"] is not None
    if found["run_peak_bytes"] is not None:
        assert found["run_peak_bytes"] >= 60 << 20


def test_without_an_allocators_figure_the_first_runs_own_memory_is_that_of_the_activations() -> None:
    class Hungry(FakeRunner):
        def compute(self, images: Any) -> Any:
            np.ones(64 << 17)  # 64 MiB, gone when the run ends
            return super().compute(images)

        def allocated_bytes(self, images: NDArray[Any]) -> None: ...

    memory = measured(Hungry()).memory
    if memory.run_peak_bytes is None:
        pytest.skip("this kernel does not reset a process's peak of memory (proc/self/clear_refs)")
    assert memory.activations_by == "anonymous memory"
    assert memory.activations_bytes is not None
    assert memory.activations_bytes >= 60 << 20


def test_what_of_the_state_cannot_be_read_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    assert machine_state(tmp_path) == {
        "load_average": None, "cpu_mhz": None, "governor": None, "cpu_celsius": None, "gpu": None
    }  # fmt: skip


def test_the_state_is_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    files = {
        "proc/loadavg": "0.50 1.25 2.00 1/300 4242\n",
        "proc/cpuinfo": "cpu MHz\t\t: 2000.000\ncpu MHz\t\t: 3000.000\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "performance\n",
        "sys/class/thermal/thermal_zone0/temp": "41500\n",
        "sys/class/hwmon/hwmon0/temp1_input": "63000\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine_state(tmp_path) == {
        "load_average": [0.5, 1.25, 2.0],
        "cpu_mhz": 2500.0,
        "governor": "performance,powersave",
        "cpu_celsius": 63.0,
        "gpu": None,
    }


def test_nvidia_smi_is_read_and_what_it_does_not_know_is_null() -> None:
    assert parse_smi("1980, 2619, 34, 118.20, 0\n") == {
        "sm_mhz": 1980.0, "memory_mhz": 2619.0, "celsius": 34.0, "watts": 118.2, "busy_percent": 0.0
    }  # fmt: skip
    found = parse_smi("[N/A], 2619, 34, [Not Supported], 0")
    assert found is not None
    assert (found["sm_mhz"], found["watts"]) == (None, None)
    assert parse_smi("No devices were found") is None


def test_infer_gives_the_outputs() -> None:
    times, outputs = infer(FakeRunner(), np.zeros((1, 1, 3, 28, 42), np.float32))
    assert times["model"] == 25
    assert outputs["depth"].shape == (1, 1, 28, 42)
