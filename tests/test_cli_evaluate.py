"""`moe3d eval`: tables and JSON of rendered and own scenes, pictures, and what is refused in one line."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
from judged_scenes import write_scene

from moe3d_deploy import errors
from moe3d_deploy.cli.main import main
from moe3d_deploy.evaluation import evaluate, rendered_scenes
from moe3d_deploy.evaluation.measures import ALIGNMENT
from moe3d_deploy.runtime.session import Session

Capture = pytest.CaptureFixture[str]

SMALL = ["--count", "2", "--views", "2", "--size", "42x28"]


def run(*arguments: object) -> int:
    return main(["eval", *map(str, arguments)])


def refusal(capsys: Capture, *arguments: object) -> str:
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.rstrip("\n")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_scene(tmp_path / "my scenes" / "desk")
    write_scene(tmp_path / "my scenes" / "hall", views=3)
    return tmp_path / "my scenes"


def test_the_table_says_what_was_measured_on_what(capsys: Capture) -> None:
    assert run(exports.checkpoint(), *SMALL, "--scenes", "test-kinds", "--first-seed", "5") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "small: test-kinds seeds 5..6, 2 views of 42x28"
    assert lines[1].split() == ["mean", "median", "scenes", "worst"]
    table = {line[: line.index("  ")]: line.split()[-3:] for line in lines[2:-1]}
    assert {"AbsRel", "delta < 1.25", "boundary F1", "flying points", "camera AUC@30", "gate entropy in nats"} < set(
        table
    )
    assert "accuracy, mean" not in table
    assert table["AbsRel"][1] == "2"
    assert table["AbsRel"][2] in ("5", "6")
    assert lines[-1] == ALIGNMENT
    assert err.startswith("scenes       2 in ")
    assert err.count("\n") == 1


def test_the_json_holds_what_the_evaluation_gives(capsys: Capture) -> None:
    """Of a checkpoint with experts, so their weights are asked for."""
    assert run(exports.checkpoint(), *SMALL, "--size", "28x28", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "small"
    assert [(r["scenes"]["width"], r["scenes"]["height"]) for r in report["runs"]] == [(42, 28), (28, 28)]
    first = report["runs"][0]
    assert first["scenes"] == {
        "split": "test-seeds", "count": 2, "first_seed": 0, "views": 2, "height": 28, "width": 42, "photographs": False,
    }  # fmt: skip
    session = Session.open(exports.checkpoint(), outputs=["expert_weights"])
    scenes = rendered_scenes(range(2), split="test-seeds", views=2, height=28, width=42)
    expected = evaluate(session.run, scenes, points=False)
    assert [result["name"] for result in first["results"]] == ["0", "1"]
    for found, result in zip(first["results"], expected.results, strict=True):
        assert found["metrics"] == pytest.approx(result.metrics, rel=1e-4, abs=1e-4)  # torch's threads share out sums
    summary = expected.summary()
    assert list(first["metrics"]) == list(summary)
    assert first["metrics"]["abs_rel"]["mean"] == pytest.approx(summary["abs_rel"].mean, rel=1e-4)
    assert first["metrics"]["abs_rel"]["worst"] == summary["abs_rel"].worst
    assert "expert_share_1" in first["metrics"]


def test_a_bundle_is_judged_in_onnx_runtime_with_points_if_asked_for(capsys: Capture) -> None:
    """Its own size is 42 pixels, and 31.5 of height are two patches."""
    assert run(exports.bundle().path, "--count", "1", "--views", "2", "--points", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["scenes"]["width"], found["scenes"]["height"]) == (42, 28)
    assert "accuracy_mean" in found["metrics"]
    assert "gate_entropy" not in found["metrics"]  # the bundle does not give the weights


def test_own_scenes_and_their_pictures(data: Path, tmp_path: Path, capsys: Capture) -> None:
    drawn = tmp_path / "drawn"
    assert run(exports.checkpoint(), "--data", data, "--pictures", drawn) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "small: 2 scenes of my scenes, size 42"
    assert sorted(str(path.relative_to(drawn)) for path in drawn.glob("*/*")) == [
        "size_42/desk_maps.png", "size_42/desk_points.png", "size_42/hall_maps.png", "size_42/hall_points.png",
    ]  # fmt: skip


def test_pictures_of_every_size_and_split_stay(data: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn"
    sizes = ["--count", "1", "--views", "1", "--size", "42x28", "--size", "28x28"]
    assert run(exports.checkpoint(), *sizes, "--pictures", drawn) == 0
    assert run(exports.checkpoint(), *sizes[:-2], "--scenes", "test-kinds", "--photographs", "--pictures", drawn) == 0
    assert run(exports.checkpoint(), "--data", data, "--size", "28", "--size", "42", "--pictures", drawn) == 0
    assert sorted(path.name for path in drawn.iterdir()) == [
        "size_28", "size_42", "test-kinds_1_views_42x28_photographs", "test-seeds_1_views_28x28",
        "test-seeds_1_views_42x28",
    ]  # fmt: skip
    pictures = [path for folder in drawn.glob("test-*") for path in folder.iterdir()]
    assert {path.name for path in pictures} == {"0_maps.png", "0_points.png"}
    assert len({path.read_bytes() for path in pictures}) == 6


def test_own_scenes_in_json_by_size(data: Path, capsys: Capture) -> None:
    assert run(exports.checkpoint(), "--data", data, "--size", "28", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert found["scenes"] == {"folder": "my scenes", "count": 2, "size": 28}
    assert [result["name"] for result in found["results"]] == ["desk", "hall"]


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "252"], "--size '252': expected width x height in pixels, such as 252x196"),
        (["--size", "0x28"], "--size '0x28': expected width x height in pixels, such as 252x196"),
        (["--size", "42x30"], "images: height is 30; accepted are 14 and more in steps of 14, the nearest is 28"),
        (["--data", "{data}", "--count", "3"], "--count is for rendered scenes and --data brings others: leave one "
         "of them out"),
        (["--data", "{data}", "--size", "42x28"], "--size '42x28': with --data the height follows from the "
         "photographs; give the width (crop) or the longer side (pad) in pixels, such as 252"),
        (["--data", "{data}", "--size", "30"], "image size 30 is not a multiple of the patch size 14; use 28"),
        (["--backend", "onnxruntime"], "{source} is not a bundle; make one with: moe3d-export {source} -o bundle"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, data: Path, capsys: Capture) -> None:
    source = exports.checkpoint()
    given = [argument.format(data=data) for argument in arguments]
    assert refusal(capsys, source, *given) == "moe3d: " + message.format(source=source)


def test_a_source_that_is_not_there_is_one_line(capsys: Capture) -> None:
    assert refusal(capsys, "moe3d-tyni").endswith("; did you mean moe3d-tiny?")


def without_truth(data: Path) -> None:
    (data / "hall" / "truth.npz").unlink()


def with_a_shape_too_few(data: Path) -> None:
    np.savez(data / "hall" / "truth.npz", depth=np.ones((84, 112)), extrinsics=np.ones(1), intrinsics=np.ones(1))


def without_a_valid_pixel(data: Path) -> None:
    with np.load(data / "hall" / "truth.npz") as file:
        np.savez(data / "hall" / "truth.npz", **{**file, "depth": 0 * file["depth"]})


def without_a_scene(data: Path) -> None:
    for name in ("desk", "hall"):
        shutil.rmtree(data / name)


def with_a_mirrored_camera(data: Path) -> None:
    with np.load(data / "hall" / "truth.npz") as file:
        mirrored = np.tile(np.diag([-1.0, 1, 1, 1])[:3], (3, 1, 1))
        np.savez(data / "hall" / "truth.npz", **{**file, "extrinsics": mirrored})


def without_a_photograph(data: Path) -> None:
    (data / "hall" / "view_1.png").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_truth, '/hall/truth.npz" is neither a file nor a folder; check the path; expected a folder per scene, '
         "with its photographs and truth.npz (docs/evaluation.md)"),
        (with_a_shape_too_few, '/hall/truth.npz": depth is float64 (84, 112); expected numbers (S, H, W)'),
        (without_a_valid_pixel, '/hall/truth.npz": no pixel has a true depth above 0; there is nothing to compare '
         "with"),
        (with_a_mirrored_camera, '/hall/truth.npz": extrinsics of view 0 hold no rotation; pass [R | t] with '
         "R R^T = 1 and det R = 1"),
        (without_a_scene, '" holds no scene; expected a folder per scene, with its photographs and truth.npz '
         "(docs/evaluation.md)"),
        (without_a_photograph, '/hall/truth.npz": depth has 3 views beside 2 photographs; pass one for each'),
    ],
)  # fmt: skip
def test_a_wrong_folder_is_one_line(spoil: Any, message: str, data: Path, capsys: Capture) -> None:
    spoil(data)
    assert refusal(capsys, exports.checkpoint(), "--data", data) == f'moe3d: "{data}{message}'


@pytest.mark.parametrize(("package", "extra"), [("scipy", "train"), ("torch", "export")])
def test_a_missing_package_is_named_before_any_work(
    package: str, extra: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert run(exports.bundle().path, *SMALL) == 1
    assert capsys.readouterr().err == f"moe3d: {package} is not installed: pip install 'moe3d-deploy[{extra}]'\n"
