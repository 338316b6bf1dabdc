"""Engines of the parts of a split model, built by TensorRT-RTX without a GPU: shapes, audit, plan, what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moe3d_deploy import planning
from moe3d_deploy.bundle import Bundle, engine_name
from moe3d_deploy.cli.main import export_main
from moe3d_deploy.config import PRESETS
from moe3d_deploy.engines.add import add_built_engine
from moe3d_deploy.engines.profiles import engines_of, of_any_views, of_part
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import InputError
from moe3d_deploy.manifest import Profile, Range, ShapeRanges
from moe3d_deploy.memory import activation_bytes
from moe3d_deploy.trt import rebuild_command

pytest.importorskip("tensorrt_rtx", reason="builds engines: pip install 'moe3d-deploy[rtx]'")
splits = pytest.importorskip("splits", reason="exports a model: pip install 'moe3d-deploy[export]'")
variants = pytest.importorskip("variants", reason="exports a model: pip install 'moe3d-deploy[export]'")
pytestmark = pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")

WHOLE = ShapeProfile.from_ranges(batch="1:2", views="2:3:6", height="28:42", width="42")


# ---- shapes


def test_each_part_gets_the_shapes_that_follow_from_the_models() -> None:
    """2 scenes of 6 views are at most 12 views of one."""
    heads = engines_of("heads", [WHOLE])
    assert heads["aggregator"] == (WHOLE,)
    assert heads["heads"] == (ShapeProfile((1, 1, 28, 42), (1, 8, 42, 42), (1, 8, 42, 42)),)
    assert engines_of("heads", [WHOLE], 20)["heads"][0].max == (1, 12, 42, 42)
    encoder = engines_of("encoder", [WHOLE])
    assert encoder["encoder"] == (ShapeProfile((1, 1, 28, 42), (1, 6, 42, 42), (1, 12, 42, 42)),)
    assert encoder["decoder"] == (WHOLE,)
    assert engines_of(None, [WHOLE]) == {None: (WHOLE,)}


def test_profiles_that_are_the_same_for_the_heads_come_once() -> None:
    few, many = (ShapeProfile.from_ranges(views=views, height="28", width="42") for views in ("2:9", "10:20"))
    assert len(of_part("heads", [few, many], 4)) == 1
    assert len(of_part("encoder", [few, many], 4)) == 2
    assert of_part("aggregator", [few, many], 4) == (few, many)


def test_a_chunk_of_heads_that_are_no_part_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        engines_of("encoder", [WHOLE], 4)
    assert str(caught.value) == ("--view-chunk 4: the heads are no part of this model (--split heads): leave it out")


def test_a_part_that_is_per_view_takes_any_views_of_a_fixed_file() -> None:
    fixed = ShapeRanges(Range(1, 1), Range(4, 4), Range(28, 28), Range(42, 42))
    free = of_any_views(fixed, "heads")
    assert (free.batch, free.views, free.height) == (Range(1, None), Range(1, None), Range(28, 28))
    assert of_any_views(fixed, "aggregator") == fixed


def test_limits_are_those_of_the_part_that_crosses_them() -> None:
    """60 views of 518x518: convolutions of the heads and keys of the global attention; chunks of 8 cross neither."""
    config = PRESETS["moe3d-1b"]
    setup = planning.Setup(config, "fp16", lambda name: "float16", "fused")

    def kinds(part: str | None, views: int) -> list[str]:
        return [line.split(" has ")[0] for line in planning.warnings_of(setup, (1, views, 518, 518), part)]

    assert kinds(None, 60) == ["a convolution", "global attention"]
    assert kinds("aggregator", 60) == ["global attention"]
    assert kinds("heads", 60) == ["a convolution"]
    assert kinds("heads", 8) == kinds("encoder", 60) == []


def test_the_name_of_an_engine_has_its_part() -> None:
    profile = Profile((1, 1, 28, 42), (1, 2, 28, 42), (1, 2, 28, 42))
    name = engine_name("small", profile, "fp16", (89,), "tensorrt-rtx", "1.7.1", part="heads")
    assert name == "small.heads_1-2-2x28x42_fp16_sm89_rtx1.7.1.plan"


# ---- built


def test_an_engine_of_each_part_of_split_heads(tmp_path: Path, capsys: Any) -> None:
    """By the command. fp32: the trunk's attention is explicit, the heads have none."""
    bundle = variants.copy(splits.heads(), tmp_path)
    flags = ("--builder", "tensorrt-rtx", "--target", "sm89", "--height", "28", "--width", "42")
    assert export_main([str(bundle.path), *flags, "--views", "1:2:5", "--view-chunk", "2"]) == 0
    shown = capsys.readouterr().err
    aggregator, heads = Bundle.open(bundle.path).manifest.engines
    assert (aggregator.part, heads.part) == ("aggregator", "heads")
    assert aggregator.profiles == (Profile((1, 1, 28, 42), (1, 2, 28, 42), (1, 5, 28, 42)),)
    assert heads.profiles == (Profile((1, 1, 28, 42), (1, 2, 28, 42), (1, 2, 28, 42)),)
    assert heads.file.startswith("engines/small.heads_1-2-2x28x42_fp32_sm89_rtx")
    assert heads.audit["summary"].endswith("convolutions 31 of 31, ExpertMix as function, no attention, not executed")
    assert aggregator.audit["summary"].startswith("fp32 matmuls ")
    assert "convolutions 1 of 1, no ExpertMix, attention fused 0 of 3" in aggregator.audit["summary"]
    assert f"audit        {heads.audit['summary']}\n" in shown
    for record in (aggregator, heads):
        plan = record.audit["plan"]
        (row,) = plan["profiles"]
        assert row["flops"] > 0
        assert row["activation_bytes"]["predicted"] == activation_bytes(
            bundle.manifest.config, record.profiles[0].max, form="explicit", part=record.part
        )
        assert row["activation_bytes"]["found"] > 0
        assert plan["notes"] == []
    whole = sum(record.audit["plan"]["weight_bytes"] for record in (aggregator, heads))
    assert (
        whole
        == planning.Setup(
            dataclasses.replace(bundle.manifest.config, point_head=False), "fp32", lambda name: "float32", "explicit"
        ).weight_bytes
    )


def test_an_engine_of_each_part_of_a_split_encoder(tmp_path: Path) -> None:
    bundle = variants.copy(splits.encoder(), tmp_path)
    shapes = ShapeProfile.from_ranges(views="1:2", height="28", width="42")
    for role, fused in (("encoder", "1 of 1"), ("decoder", "2 of 2")):
        bundle, record = add_built_engine(bundle, "tensorrt-rtx", shapes, compute_capabilities=[(8, 9)], part=role)
        assert record.audit["summary"].startswith(f"fp16 matmuls {6 * int(fused[0])} of ")
        assert f"attention fused {fused}" in record.audit["summary"]
    encoder, decoder = sorted(bundle.manifest.engines, key=lambda engine: engine.part == "decoder")
    assert (encoder.audit["expert_mix"], decoder.audit["expert_mix"]) == ("plain", "function")
    command = rebuild_command("bundle", encoder)
    assert "--part encoder --views 1:2:2 --height 28 --width 42" in command


# ---- refused


@pytest.mark.parametrize(
    ("of", "flags", "message"),
    [
        ("heads", ("--part", "encoder"), "--part encoder: the model has no such part, its parts are aggregator, heads"),
        (
            "encoder",
            ("--view-chunk", "2"),
            "--view-chunk 2: the heads are no part of this model (--split heads)",
        ),
        (
            "heads",
            ("--part", "heads", "--view-chunk", "2"),
            "--view-chunk is for the engines of all parts: with",
        ),
        (None, ("--part", "heads"), "--part heads: the model has no such part, it is one file"),
        (None, ("--view-chunk", "2"), "--view-chunk 2: the heads are no part of this model (--split heads): leave it"),
    ],
)
def test_what_a_model_has_no_engine_of_is_refused(
    of: str | None, flags: tuple[str, ...], message: str, capsys: Any
) -> None:
    exports = pytest.importorskip("exports")
    path = getattr(splits, of)().path if of else exports.bundle().path
    assert export_main([str(path), "--builder", "tensorrt-rtx", *flags]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"moe3d-export: {message}")


def test_an_engine_of_a_split_model_is_of_a_part() -> None:
    bundle = splits.heads()
    with pytest.raises(InputError) as caught:
        add_built_engine(bundle, "tensorrt-rtx", WHOLE)
    assert str(caught.value) == (
        f"the model of bundle {bundle.path} is split: an engine is of one of its parts, aggregator, heads"
    )
