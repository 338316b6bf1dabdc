"""`moe3d bench --price`: which heads are compared, and that they are what they are called."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import pytest
import torch
from bundles import edit_manifest, write_bundle
from models import PARITY_LIMIT, ROUNDING, random_images, relative_error
from test_bench_price import a_price_round, quick

from moe3d_deploy import costs
from moe3d_deploy.benchmarks.bench import price_onnx, price_run
from moe3d_deploy.benchmarks.bench.cases import Source, open_source
from moe3d_deploy.benchmarks.bench.price_forms import Completed, random_levels, whole_head
from moe3d_deploy.benchmarks.bench.price_measure import measure
from moe3d_deploy.benchmarks.bench.price_onnx import OnnxBundle, OnnxHeads
from moe3d_deploy.benchmarks.bench.price_run import head_flops, plan_price, run_price
from moe3d_deploy.benchmarks.bench.price_torch import TorchSubject, torch_subject
from moe3d_deploy.benchmarks.bench.run import Options
from moe3d_deploy.benchmarks.bench.runners import HostClock
from moe3d_deploy.checkpoint import load_model, open_checkpoint, seeded_source
from moe3d_deploy.config import PRESETS, MoeConfig
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.model.dpt import Grid

Request = dict[str, Any]

SHAPE = (1, 2, 28, 42)
CPU = torch.device("cpu")
THREE = MoeConfig(num_experts=3, hidden_channels=4, gate_hidden_channels=4, temperature=0.5)
WIDE = dataclasses.replace(exports.MOE, moe=MoeConfig(num_experts=4, hidden_channels=32, gate_hidden_channels=16))


def subject(part: str, moe: MoeConfig = exports.MOE.moe or THREE) -> TorchSubject:
    spec = SourceSpec(str(exports.checkpoint()))
    return torch_subject(spec, part, moe, SHAPE, precision="fp32", library=None, threads=None, device=CPU)


def checkpoint() -> Source:
    return open_source(str(exports.checkpoint()), backends=())


def plan(**changes: Any) -> price_run.PricePlan:
    arguments: dict[str, Any] = {
        "bundles": [], "shapes": [SHAPE], "experts": [3], "backends": ["pytorch"], "device": "cpu", **changes,
    }  # fmt: skip
    return plan_price(checkpoint(), arguments.pop("bundles"), *map(arguments.pop, ("shapes", "experts", "backends")),
                      **arguments)  # fmt: skip


# What is compared


def test_every_form_of_the_model_gives_what_the_model_gives() -> None:
    """`plain` is the checkpoint's own model, bit by bit; `merged` has other sums; `single` is another function."""
    forms = subject("model")
    forms.renew(3)
    images = torch.empty((*SHAPE[:2], 3, *SHAPE[2:])).uniform_(generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        wanted = exports.load()(images)["depth"].flatten(0, 1)
    found = {form: forms.activations(form)[0][0] for form in forms.forms}
    assert tuple(found) == ("single", "plain", "merged")
    assert np.array_equal(found["plain"], wanted)
    assert 0 < relative_error(found["merged"], wanted) < ROUNDING
    assert relative_error(found["single"], wanted) > 0.01


def test_the_head_alone_is_measured_with_its_memory() -> None:
    """Of three experts at once there are more numbers than of one; all of them fit into a few times the features."""
    found = measure(subject("head", THREE), seed=0, effort=quick(2), limit=1e-3)
    assert tuple(found.series) == ("single", "plain", "merged")
    assert found.activations_by == "allocator"
    features = 2 * 8 * 28 * 42 * 4  # bytes: views, channels, pixels
    for needed in found.activations_bytes.values():
        assert needed is not None
        assert features < needed < 20 * features


def test_new_inputs_are_new_and_the_same_for_all_forms() -> None:
    forms = subject("head")
    maps = {}
    for seed in (1, 2, 1):
        forms.renew(seed)
        depth = forms.activations("plain")[0][0]
        assert np.array_equal(maps.setdefault(seed, depth), depth)
    assert not np.array_equal(maps[1], maps[2])


def test_what_the_checkpoint_has_is_taken_and_the_rest_is_seeded() -> None:
    """VGGT's last stage is 32 wide: that of experts of 32, and random where they are 4 wide."""
    narrow, wide = open_checkpoint(exports.checkpoint()), seeded_source("wide", WIDE)
    three = Completed.of(narrow, THREE)
    for k in (0, 1):
        name = f"depth_head.experts.{k}.0.weight"
        assert torch.equal(three.tensor(name), narrow.tensor(name))
    assert three.seeded  # the third expert, and a gate of three
    assert not Completed.of(narrow, narrow.config.moe).seeded
    assert Completed.of(narrow, None).seeded
    single = Completed.of(wide, None)
    assert not single.seeded
    for leaf in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert torch.equal(
            single.tensor(f"depth_head.scratch.output_conv2.{leaf}"), wide.tensor(f"depth_head.experts.0.{leaf}")
        )
    assert torch.isfinite(load_model(three)(random_images(*SHAPE[:2], 3, *SHAPE[2:]))["depth"]).all()


def test_flop_of_the_heads_are_those_of_a_hand() -> None:
    """8 channels in, 2 views of 28x42. VGGT's branch: 9 x 8 x 32 + 32 x 2 products a pixel; an expert of 4 channels:
    9 x 8 x 4 + 4 x 2; the gate of 4 channels with 3 logits: 9 x 8 x 4 + 4 x 3."""
    single, experts = head_flops(exports.MOE, THREE, SHAPE)
    of_vggt = 9 * 8 * 32 + 32 * 2
    of_experts = 3 * (9 * 8 * 4 + 4 * 2) + 9 * 8 * 4 + 4 * 3
    assert experts - single == 2 * (2 * 28 * 42) * (of_experts - of_vggt)
    assert single == costs.total_flops(dataclasses.replace(exports.MOE, moe=None), 2, 28, 42, point_head=False)


def test_the_flop_share_of_the_large_model_is_that_of_the_plan() -> None:
    """At 2 views 518x518, where `moe3d plan` says 2.24 %."""
    single, experts = head_flops(PRESETS["moe3d-1b"], MoeConfig(), (1, 2, 518, 518))
    assert (experts - single) / single == pytest.approx(0.0224, abs=5e-5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Heads of the checkpoint's own two experts, as ONNX files."""
    request = {
        "source": dataclasses.asdict(SourceSpec(str(exports.checkpoint()))),
        "moe": dataclasses.asdict(exports.MOE.moe),  # type: ignore[call-overload]
        "precision": "fp32",
        "folder": str(tmp_path_factory.mktemp("heads")),
    }
    return {form: Path(path) for form, path in price_onnx.export_heads(request, lambda event: None).items()}


def test_exported_heads_are_pytorchs(files: dict[str, Path]) -> None:
    heads = OnnxHeads(files, exports.MOE, SHAPE, threads=1)
    heads.renew(0)
    model = exports.load()
    (tokens,) = (torch.from_numpy(value) for value in heads._tokens.values())
    with torch.inference_mode():
        levels = [tokens.flatten(2, 3).flatten(0, 1)] * 4
        features = model.depth_head.features(levels, Grid(2, 3))
        wanted = model.depth_head.mixture(features)
    assert heads.forms == ("single", "plain", "function")
    for form in ("plain", "function"):
        depth, confidence = heads.run(form)
        assert relative_error(depth[0], wanted.depth) < PARITY_LIMIT
        assert relative_error(confidence[0], wanted.confidence) < PARITY_LIMIT
    assert relative_error(heads.run("single")[0][0], wanted.depth) > 0.01
    ops = {form: [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
           for form, path in files.items()}  # fmt: skip
    assert {form: names.count("ExpertMix") for form, names in ops.items()} == {"single": 0, "plain": 0, "function": 1}
    # A head's file has the head alone: 4 x 64 x 8 projections and less than 50,000 values in all.
    assert all(path.with_name(path.name + ".data").stat().st_size < 200_000 for path in files.values())


def test_exported_heads_are_measured(files: dict[str, Path]) -> None:
    found = measure(OnnxHeads(files, exports.MOE, SHAPE, threads=1), seed=0, effort=quick(2), limit=1e-3)
    assert tuple(found.series) == ("single", "plain", "function")
    assert (found.threads, found.activations_by) == (1, "anonymous memory")


def test_tokens_are_those_that_were_asked_for() -> None:
    levels = random_levels(exports.MOE, 2, Grid(2, 3), CPU, seed=1)
    assert [tuple(level.shape) for level in levels] == [(2, 6, 64)] * 4
    head = exports.load().depth_head
    depth, confidence = whole_head(head, levels, Grid(2, 3), lambda features: head.mixture(features)[:2])
    assert depth.shape == confidence.shape == (2, 28, 42)


# Planning


def test_the_own_number_of_experts_is_always_there_and_measured_in_the_model() -> None:
    found = [(item.case.part, item.case.num_experts) for item in plan(experts=[8, 3]).planned]
    assert found == [("model", 2), ("head", 2), ("head", 3), ("head", 8)]


def test_defaults_follow_the_device() -> None:
    on_cpu, on_gpu = (plan(shapes=[], backends=[], device=device) for device in ("cpu", "cuda"))
    assert {item.case.backend for item in on_cpu.planned} == {"pytorch", "onnxruntime"}
    assert sorted({item.case.shape[1] for item in on_cpu.planned}) == [1, 2]
    assert {(item.case.backend, item.case.precision) for item in on_gpu.planned} == {("pytorch", "fp16")}
    assert sorted({item.case.shape[1] for item in on_gpu.planned}) == [1, 2, 4, 8, 16]
    assert on_gpu.exports == {}
    assert sorted(on_cpu.exports) == [2, 3]


def test_a_form_that_does_not_run_here_says_why() -> None:
    (item, *_) = plan().planned
    assert item.case.missing == {"kernel": "the kernel needs a GPU that PyTorch sees, and there is none"}


def a_bundle(path: Path, precision: str = "fp32", merged_experts: bool = True) -> Source:
    """As if made of the checkpoint."""
    write_bundle(path)
    edit_manifest(path, merged_experts=merged_experts)
    opened = {"source": str(path), "kind": "bundle", "backend": "onnxruntime", "precision": precision}
    return dataclasses.replace(checkpoint(), **opened)


def test_a_bundle_of_another_model_is_refused(tmp_path: Path) -> None:
    bundle = dataclasses.replace(a_bundle(tmp_path / "b"), config=WIDE)
    with pytest.raises(InputError, match=r"bundle .*b has another config than .*small, and --price compares heads"):
        plan(bundles=[bundle])


def test_heads_have_the_precision_of_the_bundle_that_gives_the_total(tmp_path: Path) -> None:
    """One of bf16 cannot give it: its heads do not run in ONNX Runtime on a CPU."""
    bf16, fp16 = (a_bundle(tmp_path / name, precision=name) for name in ("bf16", "fp16"))
    found = plan(bundles=[bf16, fp16], backends=["onnxruntime"])
    assert [(item.case.part, item.case.precision) for item in found.planned] == [
        ("bundle", "fp16"), ("head", "fp16"), ("head", "fp16"),
    ]  # fmt: skip
    assert {request["precision"] for request in found.exports.values()} == {"fp16"}
    without = plan(bundles=[bf16], backends=["onnxruntime"])
    assert {(item.case.part, item.case.precision) for item in without.planned} == {("head", "fp32")}


@pytest.mark.parametrize(("merged", "form"), [(True, "function"), (False, "plain")])
def test_the_form_of_a_bundle_is_that_of_its_export(merged: bool, form: str, tmp_path: Path) -> None:
    bundle = a_bundle(tmp_path / "bundle", merged_experts=merged)
    (item, *_) = plan(bundles=[bundle], backends=["onnxruntime"]).planned
    assert (item.request["bundle"], item.request["bundle_form"]) == (str(tmp_path / "bundle"), form)


def test_a_bundle_runs_as_it_does_everywhere_on_new_images(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    class Runner:
        input_type, threads, stages, clock = "float32", 3, ("model",), HostClock()

        def __init__(self, source: str, *, threads: int | None) -> None:
            assert (source, threads) == ("some/bundle", 3)

        def load(self) -> None:
            pass

        def upload(self, images: Any) -> Any:
            return images

        def compute(self, images: Any) -> Any:
            given.append(float(images[0, 0, 0, 0, 0]))
            return {"depth": images[:, :, 0] + 1, "depth_conf": images[:, :, 0] + 1}

        def download(self, outputs: Any) -> Any:
            return outputs

    monkeypatch.setattr(price_onnx, "OnnxRunner", Runner)
    found = measure(OnnxBundle("some/bundle", "function", SHAPE, threads=3), seed=0, effort=quick(2), limit=1e-2)
    assert {form: len(times) for form, times in found.series.items()} == {"function": 2}
    assert len(set(given)) == len(given) == 4  # for the memory, one to warm up, two that count


# Measuring


def series_of(request: Request) -> dict[str, tuple[float, ...]]:
    forms = ("single", "plain", "merged") if request["backend"] == "pytorch" else ("single", "plain", "function")
    return {form: (10.0 + i, 10.1 + i) for i, form in enumerate(forms)}


def made_up(request: Request, on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    on_event({"step": "turns"})
    return dataclasses.asdict(a_price_round(series_of(request), seed=request["seed"]))


def no_export(request: Request, on_event: Any) -> dict[str, Any]:
    return {"single": "a.onnx"}


def test_every_case_has_its_processes_in_turns() -> None:
    requests: list[Request] = []
    kept: list[tuple[int, int]] = []

    def measured(request: Request, on_event: Any) -> dict[str, Any]:
        requests.append(request)
        return made_up(request, on_event)

    found = run_price(
        plan(backends=["onnxruntime"]),
        Options(4, 1.0, 2, threads=1),
        measure=measured,
        export=no_export,
        keep=lambda price, done: kept.append((sum(len(case.rounds) for case in price.cases), done)),
    )
    assert [request["moe"]["num_experts"] for request in requests] == [2, 3, 2, 3]
    assert [len({item.seed for item in case.rounds}) for case in found.cases] == [2, 2]
    assert {request["files"]["single"] for request in requests} == {"a.onnx"}
    assert requests[0]["effort"]["min_runs"] == 2  # four turns in two processes
    assert kept == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_case_that_fails_is_an_entry_and_the_others_run() -> None:
    asked: list[str] = []

    def measured(request: Request, on_event: Any) -> dict[str, Any]:
        asked.append(request["part"])
        if request["part"] == "model":
            raise Moe3dError("the forms do not give one result, so their times say nothing: merged: off by 1")
        return made_up(request, on_event)

    found = run_price(plan(), Options(2, 1.0, 2), measure=measured)
    assert asked == ["model", "head", "head", "head", "head"]  # what has failed is not asked again
    assert [(case.status, len(case.rounds)) for case in found.cases] == [
        ("failed", 0),
        ("measured", 2),
        ("measured", 2),
    ]
    assert found.cases[0].reason == (
        "the forms do not give one result, so their times say nothing: merged: off by 1"
    )  # fmt: skip


def test_heads_that_cannot_be_exported_fail_with_the_reason() -> None:
    def broken(request: Request, on_event: Any) -> dict[str, Any]:
        raise Moe3dError("the model depends on a concrete shape")

    found = run_price(plan(backends=["onnxruntime"]), Options(2, 1.0, 2), measure=made_up, export=broken)
    assert {(case.status, case.reason) for case in found.cases} == {
        ("failed", "the model depends on a concrete shape")
    }  # fmt: skip


def test_a_process_that_dies_is_an_entry_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(request: Request, on_event: Any) -> dict[str, Any]:
        title = "the case's process"
        return price_run.run_in_child("bench_reports:die", {}, title=title, on_event=on_event).value

    found = run_price(plan(), Options(1, 1.0, 1), measure=measured)
    assert {case.reason for case in found.cases} == {
        "the case's process was killed; the machine probably ran out of memory (see `dmesg`): free some and try again"
    }
