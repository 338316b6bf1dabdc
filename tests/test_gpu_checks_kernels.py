"""The GPU checks of the expert-mix kernel, on the CPU's stand-in: what they compare, and what they call wrong.

Not run here: a GPU, its times, and a real compute-sanitizer.
"""

import ctypes
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorder import Recorder
from test_gpu_checks_torch import CPU, QUICK, SMALLEST
from test_native_math import reference as numpy_reference

from moe3d_deploy.benchmarks import checks_head_price, checks_kernels, kernel_cases, kernel_launches
from moe3d_deploy.benchmarks.bench import price_forms
from moe3d_deploy.benchmarks.kernel_cases import Case, cases, hidden_for, operands_for, reference, worst_error
from moe3d_deploy.config import MoeConfig
from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.native import torch_op
from moe3d_deploy.native.loading import VARIABLE, ExpertMixLibrary, load

pytest_plugins = ["native_fixtures", "native_library"]
pytestmark = pytest.mark.usefixtures("on_cpu")

SMALL = [
    Case("float32", "nchw", 1, 2, 4),
    Case("float16", "channels_last", 2, 3, 5, 3, 8, 16, 8),
    Case("bfloat16", "nchw", 2, 3, 3, 5, 8, 8),
]


@pytest.fixture
def run(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


def test_the_cases_cover_what_they_are_to_cover() -> None:
    found = list(cases())
    for kind in {(case.type_name, case.layout) for case in found}:
        of_kind = [case for case in found if (case.type_name, case.layout) == kind]
        assert {case.experts for case in of_kind} == set(range(1, 17))
        maps = {(case.views, case.height, case.width) for case in of_kind}
        assert {(1, 1, 1), (16, 518, 518), (1, 517, 519)} <= maps
        assert {height * width % 4 for _, height, width in maps} == {0, 1, 2, 3}
        assert max(4 * case.experts * (2 * case.expert_width + case.gate_width + 3) for case in of_kind) > 48 * 1024
    assert len({(case.type_name, case.layout) for case in found}) == 6
    assert any(case.padding for case in found)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_reference_and_its_bound_are_those_of_the_kernels_own_tests(case: Case) -> None:
    generator = torch.Generator().manual_seed(1)
    operands, hidden = operands_for(case, generator), hidden_for(case, generator)
    arrays = tuple(operand.numpy() for operand in operands)
    expected = numpy_reference(hidden.float().numpy(), arrays, 0.7)
    for mine, its in zip(reference(hidden, operands, 0.7), expected, strict=True):
        np.testing.assert_allclose(mine.numpy(), its, rtol=1e-12)


def test_seeded_maps_are_in_the_layout_that_the_case_names() -> None:
    for case in SMALL:
        hidden = hidden_for(case, torch.Generator().manual_seed(1))
        assert hidden.shape == (case.views, case.channels, case.height, case.width)
        assert hidden.dtype == kernel_cases.TYPES[case.type_name]
        assert torch_op._layout(hidden) == ((0, 0) if case.layout == "nchw" else (1, case.channels + case.padding))
        assert bool((hidden >= 0).all())


def test_a_kernel_within_float32s_error_passes(run: Recorder, stand_in: Path) -> None:
    checks_kernels.compare_values(run, stand_in, CPU, SMALL, seed=3)
    checks_kernels.compare_edges(run, stand_in, CPU)
    assert run.failures == []
    assert run.figures["cases"] == 2 * len(SMALL)
    assert run.figures["seed"] == 3
    assert set(run.figures["worst"]) == {"float32 nchw", "float16 channels_last", "bfloat16 nchw"}
    assert all(0 < error <= 1 for error in run.figures["worst"].values())
    assert run.figures["edges"] == 2 * 3 * (3 + 4)


def spoil(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let `change` see what every mix has written, depth, confidence, weights, before it is compared."""

    def spoilt(*given: Any) -> Any:
        outputs = mixed(*given)
        change(*outputs)
        return outputs

    mixed = checks_kernels.run_expert_mix
    monkeypatch.setattr(checks_kernels, "run_expert_mix", spoilt)


def test_an_error_beyond_float32s_fails_and_names_the_case(
    run: Recorder, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part in 10,000 at one pixel of the last view, as a lost channel or a half-precision sum would give."""
    spoil(monkeypatch, lambda depth, confidence, weights: depth[-1, -1, -1].mul_(1.0001))
    checks_kernels.compare_values(run, stand_in, CPU, SMALL[2:], seed=3)
    assert len(run.failures) == 2
    assert run.failures[0].startswith("bfloat16 nchw 2x3x3, 5 experts of 8, gate of 8: off by ")


def test_an_output_that_was_not_written_fails(run: Recorder, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda depth, confidence, weights: confidence[0, 0, 0].fill_(float("nan")))
    checks_kernels.compare_values(run, stand_in, CPU, SMALL[1:2], seed=3)
    assert "off by inf times what float32 may be" in run.failures[0]


def test_a_nan_that_is_lost_or_spreads_fails(run: Recorder, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda depth, confidence, weights: depth.nan_to_num_(nan=0.0))
    checks_kernels.compare_edges(run, stand_in, CPU)
    assert len(run.failures) == 2 * 3 * 3
    assert run.failures[0].endswith("NaN in channel 0: depth has 0 NaN pixels, expected its own")


def test_a_softmax_that_overflows_fails(run: Recorder, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(depth: Any, confidence: Any, weights: Any) -> None:
        if weights.shape[1] == 3:  # the cases of extreme logits
            weights.fill_(float("nan"))

    spoil(monkeypatch, overflow)
    checks_kernels.compare_edges(run, stand_in, CPU)
    assert len(run.failures) == 2 * 3 * 4
    assert run.failures[0].endswith("the weights are not those of the largest logit alone")


def test_the_worst_error_is_a_share_of_the_bound() -> None:
    case = Case("float32", "nchw", 1, 1, 2, 1, 8, 8)
    generator = torch.Generator().manual_seed(1)
    operands, hidden = operands_for(case, generator), hidden_for(case, generator)
    expected = reference(hidden, operands, 1.0)
    off = expected.depth * (1 + 3 * expected.bound)
    assert worst_error((off, expected.confidence, torch.empty(0)), expected) == pytest.approx(3, rel=1e-6)


def measure_bandwidth(run: Recorder, path: Path) -> None:
    checks_kernels.measure_bandwidth(run, path, CPU, views=(1, 2), side=6, rotated_bytes=1, effort=QUICK)


def test_bandwidth_is_taken_for_every_type_layout_and_number_of_views(run: Recorder, stand_in: Path) -> None:
    """160 channels and two float32 outputs: 36 x (160 x 2 + 8) bytes a view in 16 bits."""
    measure_bandwidth(run, stand_in)
    found = run.figures["bandwidth"]
    kinds = [(t, layout, n) for t in kernel_cases.TYPES for layout in kernel_cases.LAYOUTS for n in (1, 2)]
    assert [(entry["type"], entry["layout"], entry["views"]) for entry in found] == kinds
    assert found[4]["bytes"] == 36 * (160 * 2 + 8)
    for entry in found:
        assert entry["mix_gb_per_s"] == pytest.approx(entry["bytes"] / entry["mix_ms"] / 1e6)
        assert 0 < entry["share"]["p10"] <= entry["share"]["median"] <= entry["share"]["p90"]
    # g++'s build of this takes far longer than a copy: what a slow kernel looks like.
    assert run.figures["goal_reached"] == {"nchw": False, "channels_last": False}
    assert [note for note in run.notes if note.endswith("of a copy's bandwidth at the least, goal 85%")]
    assert run.failures == []


def test_a_bandwidth_that_cannot_be_is_a_failure(
    run: Recorder, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that was not run at all."""
    monkeypatch.setattr(ExpertMixLibrary, "mix", lambda *_: None)
    monkeypatch.setattr(checks_kernels, "_IMPOSSIBLE_SHARE", 1e-3)  # a copy of so few bytes takes no longer either
    measure_bandwidth(run, stand_in)
    assert len(run.failures) == 12
    assert run.failures[0].endswith("of a copy's bandwidth cannot be, so one of the two times is wrong")


class HostMemory:
    """Blocks of exactly the asked size in this process."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.most = 0

    def put(self, data: Any) -> int:
        buffer = np.empty(data.nbytes + 16, np.uint8)
        start = -buffer.ctypes.data % 16  # as every GPU allocation is aligned
        block = buffer[start : start + data.nbytes]
        block[:] = data
        self.blocks[block.ctypes.data] = block
        self.most = max(self.most, len(self.blocks))
        return int(block.ctypes.data)

    def get(self, address: int, size: int) -> Any:
        assert self.blocks[address].nbytes == size
        return self.blocks[address].copy()

    def release(self) -> None:
        self.blocks.clear()


def test_the_sanitized_program_runs_every_kernel_and_checks_its_outputs(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = HostMemory()
    count = kernel_launches.launch_all(load(stand_in), memory)
    assert count == 4 * 5 * 12 + 12
    assert memory.blocks == {}
    assert memory.most == 8
    monkeypatch.setattr(ExpertMixLibrary, "mix", lambda *_: None)
    with pytest.raises(Moe3dError, match="^depth is not 1 everywhere: type 0, layout 0, views 1, height 1"):
        kernel_launches.launch_all(load(stand_in), memory)


def test_without_a_driver_the_sanitized_program_says_so(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    with pytest.raises(Moe3dError, match="^there is no CUDA driver; run this where a GPU is$"):
        kernel_launches.CudaMemory()


def fake_sanitizer(folder: Path, memcheck: str) -> str:
    """A program that does `memcheck` for that tool, and runs what it is given for the others."""
    script = folder / "compute-sanitizer"
    script.write_text(
        '#!/bin/sh\ntool="$2"; shift 4\n'
        f'if [ "$tool" = memcheck ]; then {memcheck}; fi\n'
        '"$@" && echo "========= ERROR SUMMARY: 0 errors"\n'
    )
    script.chmod(0o755)
    return str(script)


def sanitize(run: Recorder, path: Path, memcheck: str) -> None:
    (run.work / "mixes_of_a_test.py").write_text("import sys; print(sys.argv[1])\n")
    program = fake_sanitizer(run.work, memcheck)
    checks_kernels.sanitize(run, path, program, module="mixes_of_a_test")


def test_every_tool_of_the_sanitizer_runs_and_its_summary_is_kept(
    run: Recorder, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(run.work))
    sanitize(run, stand_in, "true")
    assert run.failures == []
    clean = {"code": 0, "says": "ERROR SUMMARY: 0 errors"}
    assert run.figures["tools"] == dict.fromkeys(("memcheck", "racecheck", "initcheck", "synccheck"), clean)


@pytest.mark.parametrize(
    ("memcheck", "failure"),
    [
        ('echo "========= ERROR SUMMARY: 3 errors"; exit 86', "memcheck: ERROR SUMMARY: 3 errors"),
        ('echo "no device"; exit 1', "memcheck ended with code 1: no device"),
    ],
)
def test_what_the_sanitizer_finds_fails(
    run: Recorder, stand_in: Path, monkeypatch: pytest.MonkeyPatch, memcheck: str, failure: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(run.work))
    sanitize(run, stand_in, memcheck)
    assert run.failures == [failure]


def test_an_absent_sanitizer_is_recorded_as_absent(run: Recorder, stand_in: Path) -> None:
    with pytest.raises(Exception, match="^compute-sanitizer is absent; it comes with the CUDA toolkit$"):
        checks_kernels.sanitize(run, stand_in, None)


def test_the_library_is_the_named_one_else_a_fresh_build_else_none(
    run: Recorder, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def build(folder: Path) -> None:
        (folder / "libmoe3d_expert_mix.so").write_bytes(stand_in.read_bytes())
        built.append(folder)

    monkeypatch.setattr(checks_kernels, "build", build)
    monkeypatch.setenv(VARIABLE, str(stand_in))
    assert checks_kernels.kernel_library(run) == stand_in
    assert run.figures["library"] == {"origin": "MOE3D_NATIVE", "sha256": load(stand_in).digest()}
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(checks_kernels, "find", lambda: None)
    monkeypatch.setattr(checks_kernels, "find_nvcc", lambda: None)
    with pytest.raises(Exception, match="there is no nvcc to build .*; name one that was built elsewhere in MOE3D_NAT"):
        checks_kernels.kernel_library(run)
    monkeypatch.setattr(checks_kernels, "find_nvcc", lambda: sys.executable)
    for _ in range(2):  # the second check of a run takes the first one's
        assert checks_kernels.kernel_library(run) == run.work / "libmoe3d_expert_mix.so"
    assert built == [run.work]


CONFIG = dataclasses.replace(SMALLEST, moe=MoeConfig(3, 32, 16, 0.5))


def measure_price(run: Recorder, path: Path, views: tuple[int, ...] = (1, 2)) -> None:
    checks_head_price.measure_price(
        run, CONFIG, "smallest", path, CPU, views=views, size=(14, 28), precision="fp32", effort=QUICK
    )


def test_the_price_of_every_form_is_taken_at_the_level_of_the_model(run: Recorder, stand_in: Path) -> None:
    measure_price(run, stand_in)
    assert run.failures == []
    found = run.figures["cases"]
    assert [(case["views"], case["form"]) for case in found] == [
        (views, form) for views in (1, 2) for form in ("plain", "merged", "kernel")
    ]
    for case in found:
        assert case["price"] == pytest.approx(case["time_share"] / case["flop_share"])
        assert case["added_ms"] == pytest.approx(case["head_ms"] - case["single_head_ms"])
        assert ("tail_ms" in case) == (case["form"] != "plain")
    assert set(run.figures["goals_reached"]) == {"price", "tail_share"}


def test_the_added_arithmetic_is_that_of_the_branches() -> None:
    """At 14x28 pixels and 8 channels in: a branch of 32 is 2 x 392 x 32 x (9 x 8 + 2) FLOP. Two experts more, and the
    gate's 16 channels with 3 logits."""
    single, experts = checks_head_price._flop(CONFIG, 1, (14, 28))
    assert experts - single == 2 * 392 * (2 * 32 * (9 * 8 + 2) + 16 * (9 * 8 + 3))


def test_the_figures_follow_from_the_times() -> None:
    """Head 10 ms alone, 14 plain, 13 merged, 12 with the kernel; the model with the kernel 102, its tail 0.4."""
    from moe3d_deploy.benchmarks.timing import Ratio, Timing

    def timing(ms: float) -> Timing:
        return Timing(ms, ms, ms, 1, 1, True)

    measured: dict[str, Any] = {
        form: Ratio(ms / 10, ms / 10, ms / 10, timing(10), timing(ms))
        for form, ms in (("plain", 14.0), ("merged", 13.0), ("kernel", 12.0))
    }
    measured |= {"merged tail": timing(2.0), "kernel tail": timing(0.4)}
    plain, merged, kernel = checks_head_price._cases(8, 102.0, measured, (1000, 1010))
    assert plain["single_model_ms"] == 100
    assert [case["time_share"] for case in (plain, merged, kernel)] == [0.04, 0.03, 0.02]
    assert [case["price"] for case in (plain, merged, kernel)] == pytest.approx([4.0, 3.0, 2.0])
    assert merged["tail_share"] == pytest.approx(2.0 / 103)
    assert kernel["tail_share"] == pytest.approx(0.4 / 102)
    assert "tail_share" not in plain


def test_missed_goals_are_notes_and_reached_ones_are_recorded(run: Recorder) -> None:
    def case(views: int, price: float, tail: float) -> dict[str, Any]:
        return {"form": "kernel", "views": views, "price": price, "tail_share": tail, "stable": True}

    checks_head_price._judge(run, [case(1, 1.2, 0.004), case(8, 1.3, 0.003)])
    assert run.figures["goals_reached"] == {"price": False, "tail_share": True}
    assert run.notes == ["price with the kernel is 1.30 at 8 views, goal 1.25"]


def test_a_form_that_gives_other_maps_fails(run: Recorder, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(merged: Any, path: Path) -> Any:
        merged.gate_bias.add_(torch.tensor([0.0, 1.0, 2.0]))
        return unchanged(merged, path)

    unchanged = price_forms.KernelExperts
    monkeypatch.setattr(price_forms, "KernelExperts", forget)
    measure_price(run, stand_in, views=(1,))
    assert [line.partition(":")[0] for line in run.failures] == ["1 views, merged", "1 views, kernel"]
