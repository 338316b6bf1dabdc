"""`moe3d inspect` shows what is in a bundle, after checking it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from manifests import ENGINE, example_engine, example_manifest

from moe3d_deploy.bundle import BundleWriter, add_engine
from moe3d_deploy.cli.inspect import inspect_command
from moe3d_deploy.errors import BundleError
from moe3d_deploy.manifest import Manifest, Profile, Range, ShapeRanges, Verification

MODEL = b"\x12\xcf\x09" + b"m" * 1231  # 1234 bytes of ONNX: field 2, 1231 bytes, the producer's name


def write(path: Path, manifest: Manifest) -> Path:
    with BundleWriter(path) as writer:
        (writer.folder / "model.onnx").write_bytes(MODEL)
        (writer.folder / "model.onnx.data").write_bytes(b"w" * 999)
        writer.commit(manifest)
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = write(tmp_path / "bundle", example_manifest())

    def build(temp: Path, manifest: Manifest) -> None:
        temp.write_bytes(b"e" * 2_000_000)

    add_engine(path, example_engine(), build)
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(inspect_command, [str(arg) for arg in args])


def section(output: str, label: str) -> list[str]:
    """The lines of one section, without the label column."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(label))
    end = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith(" ")), len(lines))
    return [line[14:] for line in lines[start:end]]


def test_every_part_of_the_bundle_is_shown(bundle: Path) -> None:
    result = run(bundle)
    assert result.exit_code == 0, result.output
    out = result.stdout
    assert section(out, "bundle") == [f"{bundle}, digests checked"]
    assert section(out, "model")[0] == "moe3d-tiny, K = 4 experts, merged"
    assert section(out, "checkpoint") == ["preset:moe3d-tiny seed 0", "sha256 none (no file)"]
    assert section(out, "licence") == ["Apache-2.0"]
    assert section(out, "precision") == ["fp16, opset 20"]
    assert section(out, "inputs") == ["images  float32  (B, S, 3, H, W)  RGB in [0,1]"]
    assert section(out, "outputs")[1] == "depth_conf  float32  (B, S, H, W)  at least 1"
    assert section(out, "shapes") == [
        "batch 1 and more",
        "views 1..32",
        "height 140..518 in steps of 14",
        "width 140..518 in steps of 14",
    ]
    assert [line.split() for line in section(out, "files")] == [
        [ENGINE, "2.0", "MB"],
        ["model.onnx", "1.2", "kB"],
        ["model.onnx.data", "999", "B"],
    ]
    assert section(out, "engines") == [
        ENGINE,
        "  tensorrt-rtx 1.6.1, fp16, compute capability 8.9, needs its plugin library",
        "  fp16 matmuls 456 of 456",
        "  profile BxSxHxW 1x1x392x518 / 1x4x392x518 / 1x8x392x518 (min / opt / max)",
    ]
    assert section(out, "written by") == ["moe3d_deploy 0.1.0, torch 2.13.0"]


def engine_lines(path: Path, **changes: Any) -> list[str]:
    """The lines of the example's engine after those that it always has: file, builder and audit."""
    write(path, example_manifest())
    add_engine(path, replace(example_engine(), **changes), lambda temp, _: temp.write_bytes(b"e") and None)
    result = run(path)
    assert result.exit_code == 0, result.output
    return section(result.stdout, "engines")[2:]


def test_flags_and_what_was_planned_stand_beside_what_was_built(tmp_path: Path) -> None:
    low, high = (1, 1, 392, 518), (1, 8, 392, 518)
    plan = {
        "profiles": [
            {"flops": 3_110_000_000_000, "activation_bytes": {"predicted": 400_000_000, "found": 500_000_000}},
            {"flops": 24_900_000_000_000, "activation_bytes": {"predicted": 1_383_000_000, "found": None}},
        ],
        "plan_bytes": {"predicted": 2_000_000, "found": 1_000_000},
        "notes": ["activation memory at 1x1x392x518: 500 MB where 400 MB are predicted, more than 15 % apart"],
    }
    lines = engine_lines(
        tmp_path / "bundle",
        profiles=(Profile(low, low, low), Profile(low, high, high)),
        audit={"plan": plan},
        build={"flags": {"workspace_bytes": 1 << 30, "tf32": True}},
    )
    assert lines == [
        "  flags tf32 true, workspace_bytes 1073741824",
        "  profile BxSxHxW 1x1x392x518 / 1x1x392x518 / 1x1x392x518 (min / opt / max)",
        "    activation memory at the largest shape, 3.11 TFLOP: planned 400.0 MB, built 500.0 MB, 1.25 of the plan",
        "  profile BxSxHxW 1x1x392x518 / 1x8x392x518 / 1x8x392x518 (min / opt / max)",
        "    size of the engine, planned as its weights: planned 2.0 MB, built 1.0 MB, 0.50 of the plan",
        "  note: activation memory at 1x1x392x518: 500 MB where 400 MB are predicted, more than 15 % apart",
    ]


def test_plugin_accepted_findings_and_notes_are_shown(tmp_path: Path) -> None:
    digest = "d1" * 32
    findings = [
        {"name": "attention", "text": "12 attentions are to be fused, the engine has 11", "accepted": True},
        {"name": "matmul-types", "text": "nobody accepted this", "accepted": False},
    ]
    path = tmp_path / "bundle"
    lines = engine_lines(
        path,
        plugin={"layers": ["ExpertMix"], "library": "lib.so", "sha256": digest},
        audit={"findings": findings, "notes": ["of the audit"], "plan": {"notes": ["of the plan"]}},
    )
    (about,) = [line for line in run(path).stdout.splitlines() if "compute capability" in line]
    assert about.endswith(f", needs the plugin library of sha256 {digest}")
    assert lines[0] == "  accepted (attention): 12 attentions are to be fused, the engine has 11"
    assert lines[-2:] == ["  note: of the audit", "  note: of the plan"]
    assert "nobody accepted this" not in run(path).stdout


@pytest.mark.parametrize("audit", [{"findings": 3, "notes": "x"}, {"findings": [3, {"accepted": True}, {"name": "a"}]}])
def test_findings_of_another_form_are_passed_over(tmp_path: Path, audit: dict[str, Any]) -> None:
    (line,) = engine_lines(tmp_path / "bundle", audit=audit)
    assert line.startswith("  profile BxSxHxW ")


@pytest.mark.parametrize(
    "plan",
    [
        None, [], "x", {}, {"profiles": 3, "notes": 3, "plan_bytes": []}, {"profiles": [3, {}, None]},
        {"profiles": [{"flops": -1, "activation_bytes": {"predicted": 0, "found": 1}}]},
        {"plan_bytes": {"predicted": True, "found": 1.5}},
    ],
)  # fmt: skip
def test_a_plan_of_another_form_is_passed_over(tmp_path: Path, plan: Any) -> None:
    (line,) = engine_lines(tmp_path / "bundle", audit={"plan": plan}, build={"flags": []})
    assert line.startswith("  profile BxSxHxW 1x1x392x518 / 1x4x392x518 / ")


def test_the_verification_shows_the_worst_of_all_cases_for_each_limit_and_the_worst_headroom(bundle: Path) -> None:
    """p99 has no limit, and neither has the mean of pose_enc, which falls under "*"."""
    lines = section(run(bundle).stdout, "verification")
    assert [line.split() for line in lines[1:-1]] == [
        ["executed", "depth", "max", "0.0052", "limit", "0.01"],
        ["executed", "pose_enc", "max", "0.0001", "limit", "0.02"],
        ["rounded", "depth", "max", "0.0063", "limit", "0.01"],
        ["rounded", "depth", "mean", "0.0002", "limit", "0.001"],
    ]
    assert lines[0] == "passed, 2 cases"
    assert lines[-1] == "largest share of the 16-bit range: 0.31 in depth_head.out, limit 0.5"


def test_a_verification_of_another_inner_form_is_passed_over(tmp_path: Path) -> None:
    cases = ({"errors": [1, 2]}, {"errors": {"depth": 1}}, {"errors": {"a": {"b": {"c": {"d": 1}}}}}, {"note": "none"})
    verification = Verification("passed", {"depth": 1e-2, "*": []}, cases, {"largest": 3, "limit": "none"})
    path = write(tmp_path / "bundle", replace(example_manifest(), verification=verification))
    assert section(run(path).stdout, "verification")[0] == "passed, 4 cases"


def test_a_bundle_without_experts_engines_and_verification_is_shown_as_such(tmp_path: Path) -> None:
    manifest = replace(
        example_manifest(),
        model_config={},
        verification=Verification("skipped"),
        shape_ranges=ShapeRanges(Range(1, 1), Range(1, None), Range(14, None, 14), Range(14, None, 14)),
    )
    out = run(write(tmp_path / "bundle", manifest)).stdout
    assert "no experts (VGGT head)" in section(out, "model")[0]
    assert section(out, "shapes")[:3] == ["batch 1", "views 1 and more", "height 14 and more in steps of 14"]
    assert section(out, "engines") == ["none"]
    assert section(out, "verification") == ["skipped, 0 cases"]


def test_json_holds_the_whole_manifest_and_nothing_else_is_printed(bundle: Path) -> None:
    document = json.loads(run(bundle, "--json").stdout)
    assert document == {
        "bundle": str(bundle),
        "digests": "checked",
        "engine_faults": {},
        "manifest": json.loads((bundle / "manifest.json").read_text()),
    }


def test_digests_are_checked_unless_left_out_and_the_output_says_so(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(MODEL.replace(b"m", b"x"))
    damaged = run(bundle)
    assert isinstance(damaged.exception, BundleError)
    assert "model.onnx is damaged" in str(damaged.exception)
    assert damaged.stdout == ""
    assert section(run(bundle, "--no-digest").stdout, "bundle") == [f"{bundle}, digests not checked"]
    assert json.loads(run(bundle, "--no-digest", "--json").stdout)["digests"] == "not checked"


@pytest.mark.parametrize("spoilt", ["missing", "damaged"])
def test_an_engine_that_cannot_be_used_is_marked_among_all_the_rest(bundle: Path, spoilt: str) -> None:
    if spoilt == "missing":
        (bundle / ENGINE).unlink()
    else:
        (bundle / ENGINE).write_bytes(b"E" * 2_000_000)
    fault = {"missing": "is missing", "damaged": "is damaged: its SHA-256 is not the manifest's"}[spoilt]
    result = run(bundle)
    assert isinstance(result.exception, BundleError)
    assert result.exception.exit_code == 2
    assert str(result.exception) == (
        f"bundle {bundle} has 1 of 1 engines missing or damaged; build one again with: moe3d-export {bundle} "
        "--builder tensorrt-rtx --views 1:4:8 --height 392 --width 518 --target sm89"
    )
    lines = section(result.stdout, "engines")
    assert lines[0] == ENGINE
    assert lines[-1].startswith(f"  CANNOT BE USED: {bundle / ENGINE} {fault}")
    assert section(result.stdout, "written by")
    document = run(bundle, "--json")
    assert isinstance(document.exception, BundleError)
    assert list(json.loads(document.stdout)["engine_faults"]) == [ENGINE]
    assert (run(bundle, "--no-digest").exit_code == 0) == (spoilt == "damaged")


def test_control_characters_of_a_manifest_do_not_reach_the_terminal(tmp_path: Path) -> None:
    verification = Verification("passed", headroom={"largest": {"\x1b]0;title\x07": 0.5}})
    path = write(tmp_path / "bundle", replace(example_manifest(), verification=verification))
    assert section(run(path).stdout, "verification")[1] == "largest share of the 16-bit range: 0.5 in ?]0;title?"


def test_a_missing_bundle_is_a_bundle_error(tmp_path: Path) -> None:
    assert isinstance(run(tmp_path / "absent").exception, BundleError)


def test_help_has_an_example_that_runs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run("--help").stdout.splitlines()
    example = next(line.split() for line in lines if line.strip().startswith("moe3d inspect"))
    monkeypatch.chdir(bundle.parent)
    assert run(*example[2:]).exit_code == 0
