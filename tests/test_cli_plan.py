"""`moe3d plan`: what it reads, prints and refuses."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundles
import click
import pytest
from click.testing import CliRunner, Result
from manifests import example_manifest

from moe3d_deploy import costs, devices
from moe3d_deploy.bundle import BundleWriter
from moe3d_deploy.cli.main import load_command, main
from moe3d_deploy.cli.plan import parse_shapes, plan_command
from moe3d_deploy.config import PRESETS, MoeConfig
from moe3d_deploy.devices import Device
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.manifest import Manifest, Range, ShapeRanges, Tensor
from moe3d_deploy.memory import activation_bytes

TINY_DEVICE = "1e12,1e10,2e8"


def run(*args: object) -> Result:
    return CliRunner().invoke(plan_command, [str(arg) for arg in args])


def text(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def document(*args: object) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(text(*args, "--json"))
    return parsed


def commands(*args: object) -> list[str]:
    """What comes last: the commands to go on with, without their labels."""
    lines = text(*args).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(("next ", "on device ")))
    return [line[13:] for line in lines[first:]]


def refusal(*args: object) -> str:
    result = run(*args)
    assert isinstance(result.exception, (Moe3dError, SystemExit)), result.exception
    return str(result.exception) if isinstance(result.exception, Moe3dError) else result.output


def write_bundle(path: Path, manifest: Manifest) -> Path:
    with BundleWriter(path) as writer:
        (writer.folder / "model.onnx").write_bytes(bundles.OLD)
        writer.commit(manifest)
    return path


def test_neither_torch_nor_another_heavy_library_is_loaded() -> None:
    heavy = {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy", "cv2", "PIL", "scipy"}
    code = (
        "import sys; from moe3d_deploy.cli.main import main;"
        "assert main(['plan', 'moe3d-1b', '--device', 'orin', '--views-that-fit']) == 0;"
        f"loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_preset_is_planned_at_its_usual_shapes_as_it_is_exported() -> None:
    lines = text("moe3d-1b").splitlines()
    assert lines[0] == "model        preset moe3d-1b, K = 4 experts, no point head"
    assert lines[1] == "weights      2.75 GB, 1,158.1 M parameters in fp16 (218.1 M of them float32)"
    table = lines[lines.index("") + 1 : lines.index("", lines.index("") + 1)]
    assert table[0].split() == ["shape", "BxSxHxW", "GFLOP", "experts", "activations", "peak"]
    assert [row.split()[0] for row in table[1:]] == [f"1x{views}x392x518" for views in (1, 2, 4, 8, 16)]
    # VGGT's published total without its point head, and the experts' work
    gflop = costs.total_flops(PRESETS["moe3d-1b"], 8, 392, 518, point_head=False) / 1e9
    assert table[4].split()[1:3] == [f"{gflop:,.0f}", "1.89%"]
    assert gflop == pytest.approx(25_441.8 * 1.0189, rel=1e-4)


def test_peak_is_weights_and_the_predicted_activations() -> None:
    config, shape = replace(PRESETS["moe3d-1b"], point_head=False), (1, 3, 140, 154)
    found = document("moe3d-1b", "--shapes", "1x3x140x154", "--precision", "fp16")
    (row,) = found["shapes"]
    predicted = activation_bytes(config, shape, form="fused", precision="fp16")
    assert found["weight_bytes"] == costs.weight_bytes(config, PrecisionPolicy("fp16").type_of)
    assert (row["activation_bytes"], row["peak_bytes"]) == (predicted, predicted + found["weight_bytes"])


def test_a_device_adds_floors_and_what_fits() -> None:
    out = text("moe3d-1b", "--device", "rtx4090", "--shapes", "1x8x392x518")
    row = next(line for line in out.splitlines() if line.startswith("1x8x392x518")).split()
    assert row[-2:] == ["compute", "yes"]
    (plan,) = document("moe3d-1b", "--device", "rtx4090", "--shapes", "1x8x392x518")["shapes"]
    assert row[7:9] == [f"{plan['floor']['compute'] * 1e3:.0f}", "ms"]
    # 25.9 TFLOP, all but 0.015 of them at 165.2 TFLOP/s
    assert plan["floor"]["compute"] == pytest.approx(25.907e12 / 165.2e12 + 0.015e12 / 82.6e12, rel=1e-3)
    assert "floors" in out
    assert "no prediction" in out


def test_what_does_not_fit_comes_with_what_does_and_these_plans_fit() -> None:
    shape = "1x64x252x252"
    out = text("moe3d-tiny", "--device", TINY_DEVICE, "--shapes", shape, "--precision", "fp32")
    assert f"{shape} does not fit in 200 MB; what does:" in out
    offered = re.findall(r"^  (\D+?)  +peak ([\d.]+ MB)  (--shapes .+)$", out, re.MULTILINE)
    assert {label for label, _, _ in offered} >= {"fewer views", "smaller images"}
    for _, peak, flags in offered:
        options = {"--precision": "fp32", **dict(zip(*[iter(shlex.split(flags))] * 2, strict=True))}
        (plan,) = document("moe3d-tiny", "--device", TINY_DEVICE, *sum(options.items(), ()))["shapes"]
        assert plan["fits"] is True
        assert f"{plan['peak_bytes'] / 1e6:.3g} MB" == peak
    views = next(flags.split("x")[1] for label, _, flags in offered if label == "fewer views")
    more = f"1x{int(views) + 1}x252x252"
    (plan,) = document("moe3d-tiny", "--device", TINY_DEVICE, "--shapes", more, "--precision", "fp32")["shapes"]
    assert plan["fits"] is False


def test_weights_that_are_too_big_are_said_to_be() -> None:
    out = text("moe3d-1b", "--device", "1e12,1e10,1e9", "--shapes", "1x1x140x140")
    assert "1x1x140x140 does not fit in 1.00 GB: the weights alone are 2.75 GB." in out
    assert "next" not in out


def test_the_most_views_that_fit_are_shown_for_each_precision() -> None:
    args = ("moe3d-1b", "--device", "orin-nx-16", "--shapes", "1x8x518x518,1x4x518x518", "--views-that-fit")
    (line,) = re.findall(r"^most views that fit.*$", text(*args), re.MULTILINE)
    assert line == "most views that fit, 518x518 (height x width):"
    (entry,) = document(*args)["views_that_fit"]
    assert (entry["batch"], entry["height"], entry["width"]) == (1, 518, 518)
    for precision, count in entry["views"].items():
        for views, fits in ((count, True), (count + 1, False)):
            shape = f"1x{views}x518x518"
            row = document("moe3d-1b", "--device", "orin-nx-16", "--precision", precision, "--shapes", shape)["shapes"][
                0
            ]
            assert row["fits"] is fits, (precision, views)


def test_warnings_name_the_shape_that_crosses_a_limit() -> None:
    out = text("moe3d-1b", "--shapes", "1x47x518x518,1x51x518x518")
    joined = " ".join(out.split())
    assert "1x51x518x518: a convolution has 2,189,523,840 values" in joined
    assert "1x51x518x518: global attention has 70,074 keys" in joined
    assert "1x47x518x518:" not in joined


@pytest.mark.parametrize("device", [*devices.DEVICES, "cpu", TINY_DEVICE])
def test_a_line_of_text_has_at_most_100_columns(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_MEASURE_SECONDS", 0.0)
    shapes = "1x1x14x14,2x64x518x518,4x128x1036x1036"
    for line in text("moe3d-1b", "--device", device, "--shapes", shapes, "--views-that-fit").splitlines():
        assert len(line) <= 100 or "moe3d-export" in line, line


def test_json_is_one_object_with_units_in_its_names() -> None:
    found = document("moe3d-tiny", "--device", "t4", "--shapes", "2x3x56x70")
    assert found["kind"] == "preset"
    assert found["precision"] == "fp16"
    assert found["device"]["bytes_per_second"] == 320e9
    (row,) = found["shapes"]
    assert row["shape"] == [2, 3, 56, 70]
    assert sum(row["components"].values()) == row["flops"]
    assert set(row["floor"]) == {"compute", "memory", "bound"}
    assert found["parameters"]["total"] == 5_481_966


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("1x8x392x518", [(1, 8, 392, 518)]),
        ("images:1x8x3x392x518", [(1, 8, 392, 518)]),
        ("images:1x8x392x518x3", [(1, 8, 392, 518)]),
        ("1x3x3x3", [(1, 3, 3, 3)]),
        ("1x1x14x14, 2x4x28x28", [(1, 1, 14, 14), (2, 4, 28, 28)]),
    ],
)
def test_shapes_are_read_with_and_without_channels(given: str, expected: list[tuple[int, ...]]) -> None:
    assert parse_shapes(given) == expected


@pytest.mark.parametrize(
    "given", ["", "1x8", "1x8x4x392x518", "1x8x392x518,", "ax8x392x518", "1x8x-392x518", "1x8x3x3x3x3"]
)
def test_a_text_that_is_no_shape_is_refused_with_an_example(given: str) -> None:
    with pytest.raises(InputError, match="expected BxSxHxW, as 1x8x392x518, or images:1x8x3x392x518"):
        parse_shapes(given)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("moe3d-1b", "--shapes", "1x8x390x518"),
            "height 390 is not a multiple of the patch size 14; nearest: 378 and 392",
        ),
        (("moe3d-1b", "--device", "h900"), "device 'h900' is unknown; choose from h200"),
        (("moe3d-1b", "--device", "1e12"), "device '1e12' is unknown"),
        (("moe3d-1b", "--views-that-fit"), "add --device"),
        (("moe3d-1b", "--device", "t4", "--precision", "bf16"), "t4 computes no bfloat16"),
        (("moe3d-1b", "--view-chunk", "4"), "in PyTorch and in a split model only"),
        (("moe3d-tiny", "--point-head"), "moe3d-tiny has no point head; leave --point-head out"),
        (("nowhere",), "nowhere: no such bundle or checkpoint folder, nor a preset (vggt-1b, moe3d-1b, moe3d-tiny)"),
        (("moe3d-1b", "--precision", "int4"), "'int4' is not one of"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(args: tuple[str, ...], message: str) -> None:
    assert message in " ".join(refusal(*args).split())


def test_bad_input_ends_the_program_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "moe3d-1b", "--shapes", "1x8x390x518"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_checkpoint_folder_needs_its_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["moe3d-tiny"].to_dict() | {"licence": "none"}))
    shapes = ("--shapes", "1x2x56x56")
    found, preset = document(tmp_path, *shapes), document("moe3d-tiny", *shapes)
    assert found["kind"] == "checkpoint"
    assert {**found, "kind": "preset", "source": "moe3d-tiny"} == preset
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal(tmp_path)


def test_a_folder_with_neither_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path}: holds neither a manifest.json nor a config.json" in refusal(tmp_path)


def test_a_preset_and_a_folder_of_its_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vggt-1b").mkdir()
    (tmp_path / "vggt-1b" / "config.json").write_text(json.dumps(PRESETS["moe3d-tiny"].to_dict()))
    assert "write preset:vggt-1b or ./vggt-1b" in refusal("vggt-1b")
    assert "no experts" in text("preset:vggt-1b")
    assert "K = 4" in text("./vggt-1b")


def test_a_bundle_settles_precision_point_head_and_shapes(tmp_path: Path) -> None:
    manifest = example_manifest()
    ranges = replace(manifest.shape_ranges, views=Range(2, 4), height=Range(140, 518, 14))
    point_map = Tensor("point_map", "float32", ("B", "S", "H", "W", 3), "points")
    config = replace(PRESETS["moe3d-tiny"], point_head=True).to_dict()
    plain = write_bundle(tmp_path / "plain", replace(manifest, precision="fp32", shape_ranges=ranges))
    points = write_bundle(
        tmp_path / "points", replace(manifest, outputs=(*manifest.outputs, point_map), model_config=config)
    )
    found = document(plain)
    assert (found["kind"], found["precision"], found["form"]) == ("bundle", "fp32", "explicit")
    assert [row["shape"] for row in found["shapes"]] == [[1, 2, 168, 224], [1, 4, 168, 224]]
    assert found["model_config"]["point_head"] is False
    assert document(points)["model_config"]["point_head"] is True
    assert f"bundle {plain} is fp32; leave --precision out" in refusal(plain, "--precision", "fp16")
    assert f"bundle {plain} has no point head" in refusal(plain, "--point-head")
    assert "1x8x168x224: the bundle does not take this shape" in text(plain, "--shapes", "1x8x168x224")
    assert "next         moe3d-export " + str(plain) + " --views 2:4 --height 168 --width 224\n" in text(plain)


def test_a_bundle_with_plain_experts_has_no_wide_map_of_all_of_them(tmp_path: Path) -> None:
    """160 channels x 504 x 504 x 53 views are more than 2^31 - 1; a single branch has 32 of them."""
    config = replace(PRESETS["moe3d-tiny"], moe=MoeConfig(hidden_channels=32, gate_hidden_channels=32))
    manifest = replace(example_manifest(), precision="fp32", model_config=config.to_dict())
    free = replace(manifest.shape_ranges, views=Range(1, None))
    for merged, warned in ((True, True), (False, False)):
        path = write_bundle(tmp_path / str(merged), replace(manifest, merged_experts=merged, shape_ranges=free))
        (row,) = document(path, "--shapes", "1x53x504x504")["shapes"]
        assert bool(row["warnings"]) == warned


def test_pytorch_is_planned_in_float32_with_heads_in_chunks() -> None:
    whole, chunked = (
        document("moe3d-tiny", "--form", "eager", "--shapes", "1x16x252x252", *more)
        for more in ((), ("--view-chunk", "2"))
    )
    assert whole["precision"] == chunked["precision"] == "fp32"
    assert chunked["shapes"][0]["activation_bytes"] < whole["shapes"][0]["activation_bytes"]


def test_the_point_head_is_planned_when_asked_for() -> None:
    without, with_it = document("vggt-1b"), document("vggt-1b", "--point-head")
    assert with_it["parameters"]["total"] == 1_190_596_120
    assert with_it["parameters"]["total"] - without["parameters"]["total"] == with_it["parameters"]["point head"]
    assert "--outputs point_map" in text("vggt-1b", "--point-head")


def test_a_measured_cpu_is_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Device("cpu", "a CPU", {"float32": 1e11, "float16": 1e11}, 1e10, 1e11, "measured now", measured=True)
    monkeypatch.setattr("moe3d_deploy.cli.plan.find_device", lambda text: measured)
    out = text("moe3d-tiny", "--device", "cpu")
    assert "compute  " in out
    assert "compute >=" not in out
    assert "floor" not in out
    assert "ONNX Runtime may be quicker" in out
    assert out.splitlines()[-1].endswith("--builder none")
    assert "ONNX Runtime on the CPU, fused attention, all activations in float32" in out
    (half,) = document("moe3d-tiny", "--device", "cpu", "--precision", "fp16", "--shapes", "1x2x56x56")["shapes"]
    expected = activation_bytes(PRESETS["moe3d-tiny"], (1, 2, 56, 56), form="fused", precision="fp32")
    assert half["activation_bytes"] == expected
    explicit = text("moe3d-tiny", "--device", "cpu", "--form", "explicit")
    assert "ONNX Runtime on the CPU, attention weights in memory, all activations in float32" in explicit


@pytest.mark.parametrize(
    "args",
    [
        ("moe3d-1b",),
        ("moe3d-1b", "--device", "orin"),
        ("vggt-1b", "--point-head"),
        ("moe3d-tiny", "--shapes", "2x2x56x56"),
    ],
)
def test_the_last_line_is_a_command_that_export_takes(args: tuple[str, ...]) -> None:
    for command in commands(*args):
        program, *words = shlex.split(command)
        assert program == "moe3d-export"
        load_command("export").make_context("export", words)


def test_shapes_whose_largest_sizes_together_do_not_fit_get_an_engine_each() -> None:
    shapes = "1x4x1554x1554,1x64x392x518"
    (corner,) = document("moe3d-1b", "--device", "rtx4090", "--shapes", "1x64x1554x1554")["shapes"]
    assert corner["peak_bytes"] > 24e9
    assert commands("moe3d-1b", "--device", "rtx4090", "--shapes", shapes) == [
        "moe3d-export moe3d-1b -o bundle --precision fp16 --views 4 --height 1554 --width 1554",
        "moe3d-export bundle --views 64 --height 392 --width 518",
    ]
    assert commands("moe3d-1b", "--device", "h200", "--shapes", shapes)[1:] == [
        "moe3d-export bundle --builder tensorrt --views 4:64 --height 392:1554 --width 518:1554"
    ]


@pytest.mark.parametrize("name", devices.DEVICES)
def test_an_engine_is_built_on_the_device_where_tensorrt_rtx_builds_none(name: str) -> None:
    """A default engine of TensorRT-RTX is for 8.0, 8.6, 8.9 and 12.0."""
    args = ("moe3d-1b", "--device", name, "--shapes", "1x2x392x518")
    engine = " --views 2 --height 392 --width 518"
    note = "Activations are modelled on TensorRT-RTX"
    if name in ("a100", "l4", "rtx4090", "rtx3090"):
        assert commands(*args) == ["moe3d-export moe3d-1b -o bundle --precision fp16" + engine]
        assert note not in text(*args)
        return
    assert commands(*args) == [
        "moe3d-export moe3d-1b -o bundle --precision fp16 --builder none",
        "moe3d-export bundle --builder tensorrt" + engine,
    ]
    assert text(*args).splitlines()[-1].startswith("on device    moe3d-export")
    assert note in text(*args)
    assert any(note in line for line in document(*args)["notes"])


def test_what_is_offered_for_a_bundle_is_what_it_takes(tmp_path: Path) -> None:
    """The model takes any size in patches of 7; the file takes 2, 5, 8 ... 20 views of 56, 98, ... rows, 252 wide."""
    ranges = ShapeRanges(Range(1, 1), Range(2, 20, 3), Range(56, 266, 42), Range(252, 252))
    model = PRESETS["moe3d-tiny"].to_dict()
    manifest = replace(example_manifest(), precision="fp32", shape_ranges=ranges, model_config=model)
    path = write_bundle(tmp_path / "b", manifest)
    shapes = "1x20x224x252,1x2x56x252,1x3x56x252"
    args = (path, "--device", "1e12,1e10,1.5e9", "--views-that-fit", "--shapes", shapes)
    found = document(*args)
    large, _, between = found["shapes"]
    assert (large["fits"], large["taken_by_the_bundle"]) == (False, True)
    assert between["taken_by_the_bundle"] is False
    changes = {change["kind"]: change["shape"] for change in large["changes_that_fit"]}
    assert set(changes) == {"views", "size"}
    assert changes["views"][1] in (2, 5, 8, 11, 14, 17)
    assert changes["size"][2] in (56, 98, 140, 182)
    assert changes["size"][3] == 252
    for entry in found["views_that_fit"]:
        assert entry["views"].keys() == {"fp32"}
        assert entry["views"]["fp32"] in (0, *range(2, 21, 3))
    assert commands(*args) == [f"moe3d-export {path} --views 2 --height 56 --width 252"]
    assert "does not run in PyTorch" in refusal(path, "--form", "eager")
    cpu = Device("cpu", "a CPU", {"float32": 1e11}, 1e10, 1e11, "measured now", measured=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe3d_deploy.cli.plan.find_device", lambda text: cpu)
        assert commands(path, "--device", "cpu") == [f"moe3d run {path} IMAGES... -o out"]


def test_a_figure_for_merged_experts_is_said_to_be(tmp_path: Path) -> None:
    for merged in (True, False):
        path = write_bundle(tmp_path / str(merged), replace(example_manifest(), merged_experts=merged))
        assert ("predicted for merged experts" in text(path)) != merged


def test_the_examples_of_help_run() -> None:
    shown = click.Context(plan_command, info_name="plan").get_help()
    examples = re.findall(r"^ +moe3d plan (.+)$", shown, re.MULTILINE)
    assert len(examples) == 3
    for example in examples:
        text(*shlex.split(example))
