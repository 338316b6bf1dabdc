"""`moe3d run`: from PNGs on disk to the files of a scene, and every bad input as one line."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import exports
import numpy as np
import pytest
from exports import MOE
from PIL import Image

from moe3d_deploy.checkpoint import save_checkpoint, seeded_source
from moe3d_deploy.cli.main import main
from moe3d_deploy.runtime.onnx_backend import OnnxBackend

Capture = pytest.CaptureFixture[str]

VIEW_FILES = ("depth.png", "depth_color.png", "conf.png")
SCENE_FILES = ("overview.png", "points.glb", "points.ply", "scene.npz", "cameras.json")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """left.png, right.png: 84x56 pixels, so one of 42 wide is 28 high and one of 56 wide is 42 high (37.3, rounded)."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("left.png", "right.png"):
        blocks = rng.integers(0, 255, (7, 12, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / name), np.kron(blocks, np.ones((8, 7, 1), np.uint8)))
    return folder


@pytest.fixture
def run(photos: Path, tmp_path: Path) -> Callable[..., int]:
    """run(source, *options, images=...): `moe3d run source left.png right.png -o tmp_path/out options`."""

    def run_with(source: object, *options: str, images: tuple[str, ...] = ("left.png", "right.png")) -> int:
        names = [str(photos / name) for name in images]
        return main(["run", str(source), *names, "-o", str(tmp_path / "out"), *options])

    return run_with


def written(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def line_of(capsys: Capture) -> str:
    """The one line of an error; nothing may be on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err.rstrip("\n")


# ---- what it writes


def test_a_bundle_gives_depth_colours_cameras_and_points(
    run: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    assert run(exports.bundle().path) == 0

    views = {f"{index:03d}_{stem}_{kind}" for index, stem in enumerate(("left", "right")) for kind in VIEW_FILES}
    assert written(tmp_path / "out") == views | set(SCENE_FILES)
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith("small: 2 views of 42x28; load ")
    assert lines[1].startswith("depth from ")
    assert lines[1].endswith("up to the scene's scale (not metres)")
    assert lines[2] == (
        "no expert maps; for them: export its checkpoint again with --outputs expert_weights,expert_entropy"
    )
    assert lines[3] == f"11 files in {tmp_path / 'out'}: cameras.json, png, npz, ply, glb"


def test_the_written_depth_is_the_models(run: Callable[..., int], tmp_path: Path, photos: Path) -> None:
    assert run(exports.bundle().path) == 0

    with np.load(tmp_path / "out" / "scene.npz") as arrays:
        depth = arrays["depth"]
    assert depth.shape == (2, 28, 42)
    cameras = json.loads((tmp_path / "out" / "cameras.json").read_text())
    picture = cv2.imread(str(tmp_path / "out" / "001_right_depth.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_allclose(picture * cameras["depth_png_scale"], depth[1], atol=cameras["depth_png_scale"])
    images = [Image.open(photos / name) for name in ("left.png", "right.png")]
    small = [np.asarray(image.resize((42, 28), Image.Resampling.BICUBIC)) for image in images]  # VGGT's resampling
    scene = np.stack(small).transpose(0, 3, 1, 2)[None].astype(np.float32) / 255
    np.testing.assert_allclose(depth, exports.bundle().exported.in_the_runtime(scene)["depth"][0], rtol=1e-5)


def test_a_checkpoint_runs_in_pytorch_with_more_outputs(
    run: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    assert run(exports.checkpoint(), "--outputs", "expert_weights, expert_entropy", "--view-chunk", "1") == 0

    assert {"000_left_experts.png", "001_right_experts.png", "000_left_entropy.png"} <= written(tmp_path / "out")
    assert "no expert maps" not in capsys.readouterr().out


def test_the_command_that_is_named_for_expert_maps_gives_them(
    run: Callable[..., int], photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    odd = "with blank.png"
    shutil.copy(photos / "left.png", tmp_path / odd)
    options = ("--formats", "npz", "--original", "--drop-lowest", "0.5", "--outputs", "pose_enc")
    assert run(exports.checkpoint(), *options, images=("left.png", str(tmp_path / odd))) == 0
    start = "no expert maps; for them: "
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(start)]
    words = shlex.split(line.removeprefix(start))
    assert words == [
        "moe3d", "run", "--outputs=pose_enc,expert_weights,expert_entropy", f"--output={tmp_path / 'out'}",
        "--formats=npz", "--original", "--drop-lowest=0.5", str(exports.checkpoint()),
        str(photos / "left.png"), str(tmp_path / odd),
    ]  # fmt: skip
    assert main(words[1:]) == 0
    with np.load(tmp_path / "out" / "scene.npz") as arrays:
        assert {"pose_enc", "expert_weights", "expert_entropy"} <= set(arrays)


def test_a_model_without_experts_is_not_said_to_lack_their_maps(
    run: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    save_checkpoint(seeded_source("plain", dataclasses.replace(MOE, moe=None)), tmp_path / "plain")
    assert run(tmp_path / "plain", "--formats", "npz") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3, "what was run, the depth, the files"


def test_a_folder_is_a_scene_of_its_images(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["run", str(exports.bundle().path), str(photos), "-o", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["views"] == 2


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ((), [28, 42]),
        (("--size", "56"), [42, 56]),
        (("--size", "84"), [56, 84]),
        (("--mode", "pad"), [42, 42]),
        (("--mode", "pad", "--size", "56"), [56, 56]),
        (("--mode", "crop", "--size", "14"), [14, 14]),
    ],
)
def test_views_have_the_size_that_was_asked_for(
    options: tuple[str, ...], size: list[int], run: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    assert run(exports.bundle().path, "--json", *options) == 0

    out, err = capsys.readouterr()
    report = json.loads(out.splitlines()[-1])
    assert err == ""
    assert (report["model"], report["views"]) == ("small", 2)
    assert [report["height"], report["width"]] == size
    assert set(report["seconds"]) == {"load", "images", "model", "write"}
    assert all(value >= 0 for value in report["seconds"].values())
    assert {Path(name).name for name in report["files"]} == written(tmp_path / "out")
    assert all(Path(name).is_file() for name in report["files"])
    with np.load(tmp_path / "out" / "scene.npz") as arrays:
        assert list(arrays["depth"].shape) == [2, *size]


@pytest.mark.parametrize(
    ("formats", "files"),
    [
        ("npz", {"scene.npz", "cameras.json"}),
        ("ply, npz", {"points.ply", "scene.npz", "cameras.json"}),
        ("glb", {"points.glb", "cameras.json"}),
    ],
)
def test_formats_choose_what_is_written(formats: str, files: set[str], run: Callable[..., int], tmp_path: Path) -> None:
    assert run(exports.bundle().path, "--formats", formats) == 0
    assert written(tmp_path / "out") == files


def test_the_share_of_points_to_drop_is_kept_to(run: Callable[..., int], tmp_path: Path) -> None:
    counts = []
    for share in ("0", "0.5"):
        assert run(exports.bundle().path, "--formats", "ply", "--drop-lowest", share) == 0
        header = (tmp_path / "out" / "points.ply").read_bytes().partition(b"end_header")[0].decode()
        counts.append(int(header.partition("element vertex ")[2].split()[0]))
    assert counts[0] == 2 * 28 * 42
    assert counts[1] == pytest.approx(counts[0] / 2, rel=0.01)


def test_a_second_run_replaces_the_first(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(exports.bundle().path) == 0
    before = (tmp_path / "out" / "scene.npz").read_bytes()
    assert run(exports.bundle().path, "--size", "28") == 0
    assert (tmp_path / "out" / "scene.npz").read_bytes() != before


def test_a_second_run_leaves_no_picture_of_the_first(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(exports.bundle().path) == 0
    assert run(exports.bundle().path, "--formats", "png", images=("right.png",)) == 0
    assert written(tmp_path / "out") == {f"000_right_{kind}" for kind in VIEW_FILES} | {"overview.png", "cameras.json"}


# ---- what it refuses


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input is found before a model is loaded and computes, which takes long at full size."""

    def load(self: OnnxBackend, model: Path) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(OnnxBackend, "__init__", load)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--formats", "png,exr"),
            "output format 'exr' is unknown; choose from png, npz, ply, glb, colmap, colmap-txt, rrd",
        ),
        (("--formats", ""), "output format '' is unknown; choose from png, npz, ply, glb, colmap, colmap-txt, rrd"),
        (
            ("--outputs", "pose_enc"),
            "the outputs of bundle {bundle} were chosen at export; export again with --outputs",
        ),
        (
            ("--view-chunk", "1"),
            "view_chunk is for PyTorch and for split models, and the model of bundle {bundle} is one file: leave it "
            "out, or export with --split heads",
        ),
        (("--backend", "pytorch"), "{bundle} is a bundle, which holds no PyTorch weights; name its checkpoint instead"),
        (("--size", "50"), "image size 50 is not a multiple of the patch size 14; use 56"),
    ],
)
def test_options_that_do_not_fit_are_one_line_and_code_2(
    options: tuple[str, ...], message: str, run: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    assert run(exports.bundle().path, *options) == 2
    assert line_of(capsys) == "moe3d: " + message.format(bundle=exports.bundle().path)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_model")
def test_a_missing_image_is_one_line_and_code_2(run: Callable[..., int], photos: Path, capsys: Capture) -> None:
    assert run(exports.bundle().path, images=("left.png", "nothing.png")) == 2
    assert line_of(capsys) == f'moe3d: "{photos}/nothing.png" is neither a file nor a folder; check the path'


@pytest.mark.usefixtures("no_model")
def test_a_file_that_is_no_image_is_one_line_and_code_2(
    run: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "text.png").write_text("not an image")
    assert run(exports.bundle().path, images=(str(tmp_path / "text.png"),)) == 2
    assert str(tmp_path / "text.png") in line_of(capsys)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "model.onnx.data").unlink(), "model.onnx.data is missing; copy the bundle again"),
        (lambda path: (path / "model.onnx").write_bytes(b""), "model.onnx has 0 bytes, not"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is not JSON"),
        (lambda path: (path / "manifest.json").unlink(), "has no manifest.json, so it is not a bundle"),
    ],
    ids=["no weights", "empty model", "manifest cut off", "no manifest"],
)
def test_a_damaged_bundle_is_one_line_and_code_2(
    damage: Callable[[Path], None], message: str, run: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    path = shutil.copytree(exports.bundle().path, tmp_path / "bundle")
    damage(path)
    assert run(path) == 2
    line = line_of(capsys)
    assert line.startswith(f"moe3d: {path}")
    assert message in line


def test_a_source_that_does_not_exist_is_one_line_and_code_2(run: Callable[..., int], capsys: Capture) -> None:
    assert run("no-such-bundle") == 2
    assert line_of(capsys).startswith("moe3d: no-such-bundle: no such file or folder, nor a preset")


@pytest.mark.usefixtures("no_model")
def test_an_output_that_is_a_file_is_one_line_and_code_2(
    run: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "out").write_text("in the way")
    assert run(exports.bundle().path) == 2
    assert line_of(capsys) == (
        f"moe3d: {tmp_path / 'out'}: cannot write the results (File exists); choose another output folder"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "bundle"],
        ["run", "bundle", "left.png"],
        ["run", "bundle", "left.png", "-o", "out", "--mode", "stretch"],
        ["run", "bundle", "left.png", "-o", "out", "--size", "0"],
        ["run", "bundle", "left.png", "-o", "out", "--drop-lowest", "1"],
    ],
)
def test_a_wrong_call_is_a_usage_error(arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("(see moe3d --help)\n")
    assert err.count("\n") == 1


# A machine with what `pip install moe3d-deploy[cpu]` brings: everything else cannot be imported.
ROBOT = """
import sys
for name in ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "sympy", "polygraphy", "tensorrt_rtx", "scipy"):
    sys.modules[name] = None
from moe3d_deploy.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_robot_runs_and_inspects_a_bundle_without_torch(tmp_path: Path) -> None:
    bundle, photo = str(exports.bundle().path), tmp_path / "left.png"
    Image.new("RGB", (80, 60), (200, 100, 50)).save(photo)
    for arguments in (["run", bundle, str(photo), "-o", str(tmp_path / "out")], ["inspect", bundle]):
        done = subprocess.run([sys.executable, "-c", ROBOT, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "points.ply").is_file()
