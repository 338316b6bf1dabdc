"""Equal seeds give equal scenes; splits keep apart; what cannot be rendered is refused in one line."""

import hashlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from moe3d_deploy.errors import InputError, MissingExtraError
from moe3d_deploy.training.scenes import SPLITS, Scene, SceneOptions, photographs, render_scene
from moe3d_deploy.training.scenes.__main__ import main
from moe3d_deploy.training.scenes.layout import KINDS

SMALL = {"height": 42, "width": 56, "views": 2}
TENSORS = ("images", "depth", "normals", "extrinsics", "intrinsics", "edges", "surfaces")


def digest(scene: Scene) -> str:
    total = hashlib.sha256(" ".join(scene.kinds).encode())
    for name in TENSORS:
        total.update(getattr(scene, name).contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_tensors_have_the_shapes_and_types_of_the_contract() -> None:
    scene = render_scene(3, SceneOptions(height=30, width=45, views=5))
    found = {name: (getattr(scene, name).dtype, tuple(getattr(scene, name).shape)) for name in TENSORS}
    assert found == {
        "images": (torch.uint8, (5, 3, 30, 45)),
        "depth": (torch.float32, (5, 30, 45)),
        "normals": (torch.float32, (5, 30, 45, 3)),
        "extrinsics": (torch.float32, (5, 3, 4)),
        "intrinsics": (torch.float32, (5, 3, 3)),
        "edges": (torch.bool, (5, 30, 45)),
        "surfaces": (torch.int32, (5, 30, 45)),
    }
    assert scene.seed == 3
    assert scene.kinds
    assert set(scene.kinds) <= set(KINDS["train"])


def test_equal_bits_with_any_number_of_threads(threads: Callable[[int], None]) -> None:
    """At a size at which torch does split its work: above 32768 elements."""
    options = SceneOptions(views=4, photographs=True)
    digests = set()
    for count in (1, 2, 3):
        threads(count)
        digests.add(digest(render_scene(11, options)))
    assert len(digests) == 1


def test_equal_bits_after_other_scenes_and_in_another_process() -> None:
    options = SceneOptions(**SMALL)
    first = digest(render_scene(5, options))
    for split in SPLITS:
        render_scene(6, SceneOptions(**SMALL, split=split))
    torch.manual_seed(0)
    assert digest(render_scene(5, options)) == first
    code = (
        "from test_scenes_options import *; import random; random.seed(1); torch.manual_seed(1)\n"
        "print(digest(render_scene(5, SceneOptions(**SMALL))))"
    )
    arguments = [sys.executable, "-c", code]
    other = subprocess.run(arguments, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == first


def test_every_option_and_seed_gives_another_scene() -> None:
    base = SceneOptions(**SMALL)
    others = [SceneOptions(**SMALL, split=split) for split in SPLITS]
    digests = {digest(render_scene(seed, options)) for seed in (0, 1) for options in others}
    assert len(digests) == 2 * len(SPLITS)
    assert digest(render_scene(0, base)) in digests


def test_camera_effects_and_photographs_change_pictures_alone() -> None:
    plain = render_scene(9, SceneOptions(**SMALL, camera_effects=False))
    for options in (SceneOptions(**SMALL), SceneOptions(**SMALL, camera_effects=False, photographs=True)):
        other = render_scene(9, options)
        for name in TENSORS[1:]:
            assert torch.equal(getattr(plain, name), getattr(other, name)), name
        assert (plain.images != other.images).float().mean() > 0.1


def test_a_scene_is_the_same_in_another_resolution() -> None:
    """Twice the pixels of the same cameras: pixel (u, v) becomes (2 u, 2 v)."""
    coarse = render_scene(4, SceneOptions(height=32, width=48, views=2))
    fine = render_scene(4, SceneOptions(height=64, width=96, views=2))
    assert torch.equal(coarse.extrinsics, fine.extrinsics)
    same = fine.surfaces[:, ::2, ::2] == coarse.surfaces
    assert same.float().mean() > 0.999
    torch.testing.assert_close(fine.depth[:, ::2, ::2][same], coarse.depth[same], rtol=1e-4, atol=0)


def test_held_out_kinds_are_shown_by_their_split_alone() -> None:
    assert KINDS["train"].keys() == KINDS["test-seeds"].keys()
    assert not KINDS["train"].keys() & KINDS["test-kinds"].keys()
    assert len(KINDS["test-kinds"]) >= 5
    for split in SPLITS:
        options = SceneOptions(height=16, width=24, views=1, split=split)
        shown = {kind for seed in range(60) for kind in render_scene(seed, options).kinds}
        assert shown == KINDS[split].keys()  # each of them, and no other


def test_streams_of_the_splits_are_unrelated() -> None:
    """The same seed gives other cameras in every split, not the same ones around other objects."""
    poses = [render_scene(seed, SceneOptions(16, 24, 2, split)).extrinsics for seed in range(3) for split in SPLITS]
    for a in range(len(poses)):
        for b in range(a):
            assert not torch.isclose(poses[a], poses[b], atol=1e-3).all(dim=2).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 7}, "height is 7; a scene takes a whole number in 8..4096"),
        ({"width": 5000}, "width is 5000; a scene takes a whole number in 8..4096"),
        ({"views": 9}, "views is 9; a scene takes a whole number in 1..8"),
        ({"views": True}, "views is True; a scene takes a whole number in 1..8"),
        ({"views": 2.0}, "views is 2.0; a scene takes a whole number in 1..8"),
        ({"split": "val"}, "split 'val' is unknown; choose one of train, test-seeds, test-kinds"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        SceneOptions(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize("seed", [-1, 1.5, "7", None, 1 << 63])
def test_a_seed_that_is_no_whole_number_is_refused(seed: object) -> None:
    with pytest.raises(InputError, match=r"^seed is .*; a scene takes a whole number in 0\.\.9223372036854775807$"):
        render_scene(seed, SceneOptions(**SMALL))  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width", "views"), [(8, 8, 1), (9, 200, 2), (200, 9, 2), (61, 47, 8)])
def test_any_size_from_8_pixels_renders(height: int, width: int, views: int) -> None:
    scene = render_scene(0, SceneOptions(height, width, views))
    assert scene.images.shape == (views, 3, height, width)
    assert (scene.depth > 0).float().mean() > 0.5


def test_photographs_without_scikit_image_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    photographs.atlas.cache_clear()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else found(name))
    with pytest.raises(MissingExtraError) as caught:
        render_scene(0, SceneOptions(**SMALL, photographs=True))
    assert str(caught.value) == "scikit-image is not installed: pip install 'moe3d-deploy[train]'"


def test_the_photographs_that_models_are_judged_on_are_no_textures() -> None:
    assert not any("motorcycle" in name for name in photographs.NAMES)


def test_photographs_are_sampled_at_their_pixels() -> None:
    """At full size, the middle of texel (row 10, column 20) is s = 20.5 / 256 and, t pointing up, t = -10.5 / 256."""
    pytest.importorskip("skimage")
    photographs.atlas.cache_clear()
    number = photographs.NAMES.index("coffee.png")
    texels = photographs.atlas(torch.device("cpu"))
    per_photo = texels.shape[1] // len(photographs.NAMES)
    s, t = torch.tensor([20.5 / 256]), torch.tensor([-10.5 / 256])
    colour = photographs.sample(torch.tensor([number]), s, t, torch.tensor([1 / 256]))
    torch.testing.assert_close(colour[:, 0], texels[:, number * per_photo + 10 * 256 + 20], rtol=1e-4, atol=1e-5)
    whole = photographs.sample(torch.tensor([number]), s, t, torch.tensor([1e9]))  # 8 x 8 texels in all
    level = texels[:, (number + 1) * per_photo - 64 : (number + 1) * per_photo]
    assert (whole[:, 0] >= level.min(dim=1).values).all()
    assert (whole[:, 0] <= level.max(dim=1).values).all()


def test_the_command_writes_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sheet.png"
    arguments = ["--seeds", "0:3", "--size", "21x28", "--views", "2", "-o", str(out)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"3 scenes of train, written to {out}\n"
    with Image.open(out) as image:
        # Two scenes beside each other: 2 views of 28 and gaps of 4, 8 more; two rows of 4 pictures of 21.
        assert image.size == (2 * (2 * 32 + 8), 2 * (4 * 25 + 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "a:b"], "scenes: --seeds 'a:b' is not of the form 0:12"),
        (["--seeds", "5:5"], "scenes: --seeds 5:5 names 0 scenes; a sheet takes 1..200"),
        (["--size", "100"], "scenes: --size '100' is not of the form 126x168"),
        (["--views", "0"], "scenes: views is 0; a scene takes a whole number in 1..8"),
        (["-o", "nowhere/sheet.png"], "scenes: --out nowhere/sheet.png: folder nowhere does not exist; create it"),
        (["-o", "sheet.txt"], "scenes: --out sheet.txt: a sheet is a .png or .jpg file"),
    ],
)
def test_the_command_refuses_bad_input_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-o", "sheet.png", *arguments]) == 2
    assert capsys.readouterr().err == message + "\n"
