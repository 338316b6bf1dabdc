"""Opening and loading checkpoints: what fits goes through unchanged, what does not is named in one line."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe3d_deploy.bundle import engine_name
from moe3d_deploy.checkpoint import (
    VGGT_LICENCE,
    WeightSource,
    check_shapes,
    load_model,
    model_shapes,
    open_checkpoint,
    save_checkpoint,
    seeded_source,
)
from moe3d_deploy.config import PRESETS, ModelConfig, MoeConfig
from moe3d_deploy.errors import CheckpointError, InputError, Moe3dWarning
from moe3d_deploy.manifest import Checkpoint, Profile

NORM = "camera_head.token_norm.weight"
GAMMA = "aggregator.frame_blocks.0.ls1.gamma"


@pytest.fixture(scope="module")
def small(data_dir: Path) -> WeightSource:
    """Seeded weights of the golden files' model, which has a point head and no experts."""
    config = json.loads(str(np.load(data_dir / "golden_tiny_1x2x3x56x56.npz")["config"]))
    return seeded_source("small", ModelConfig.from_dict(config))


@pytest.fixture(scope="module")
def saved(small: WeightSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small` as a checkpoint folder; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "small-one"
    save_checkpoint(small, folder)
    return folder


@pytest.fixture
def edited(saved: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of the saved tensors after `edit` has changed them in place."""

    def make(edit: Callable[[dict[str, Tensor]], object]) -> Path:
        tensors = load_file(saved / "model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
        return tmp_path

    return make


def _sparse_vggt(folder: Path, data_dir: Path, drop: str = "-") -> Path:
    """VGGT-1B's model.safetensors with every real key and shape, the data a hole in the file."""
    groups = json.loads((data_dir / "vggt_1b_state_dict.json").read_text())
    header, end = {}, 0
    for name, shape in {**groups["model"], **groups["track_head"]}.items():
        if not name.startswith(drop):
            begin, end = end, end + 4 * int(np.prod(shape))
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


# Opening


def test_vggt_1b_has_the_published_keys_and_its_track_head_is_left_aside(data_dir: Path, tmp_path: Path) -> None:
    groups = json.loads((data_dir / "vggt_1b_state_dict.json").read_text())
    published = {name: tuple(shape) for name, shape in groups["model"].items()}
    assert (len(published), len(groups["track_head"])) == (1403, 394)

    source = open_checkpoint(_sparse_vggt(tmp_path, data_dir))

    assert source.config == PRESETS["vggt-1b"]
    assert source.shapes() == published == model_shapes(source.config)
    assert source.licence == VGGT_LICENCE


def test_vggts_own_config_json_is_understood(data_dir: Path, tmp_path: Path) -> None:
    _sparse_vggt(tmp_path, data_dir, drop="point_head.")
    hub = {"img_size": 518, "patch_size": 14, "embed_dim": 1024, "enable_track": True, "enable_point": False}
    (tmp_path / "config.json").write_text(json.dumps(hub))

    assert open_checkpoint(tmp_path).config == dataclasses.replace(PRESETS["vggt-1b"], point_head=False)

    (tmp_path / "config.json").write_text(json.dumps(hub | {"embed_dim": 768}))
    with pytest.raises(CheckpointError, match=r"config\.json: .* embed_dim must be 1024, got 768; use VGGT-1B"):
        open_checkpoint(tmp_path)


def test_a_preset_gives_seeded_weights_and_says_so() -> None:
    source = open_checkpoint("moe3d-tiny", seed=3)

    assert source.config == PRESETS["moe3d-tiny"]
    assert (source.name, source.origin) == ("moe3d-tiny", "preset:moe3d-tiny seed 3")
    assert source.licence == "seeded random weights, no licence"
    assert not torch.equal(source.tensor(NORM), open_checkpoint("preset:moe3d-tiny").tensor(NORM))


def test_a_folder_named_like_a_preset_must_be_told_apart(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vggt-1b").symlink_to(saved)

    with pytest.raises(CheckpointError, match=r"preset and a folder here; write preset:vggt-1b or \./vggt-1b"):
        open_checkpoint("vggt-1b")
    assert open_checkpoint("./vggt-1b").config.img_size == 56
    assert open_checkpoint("preset:vggt-1b").config.img_size == 518


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("moe3d-1B", r"moe3d-1B: no such file or folder, nor a preset \(.*\); did you mean moe3d-1b\?"),
        ("nowhere/model.safetensors", "nowhere/model.safetensors: no such file or folder"),
        ("preset:big", "preset 'big' is unknown; presets are vggt-1b, moe3d-1b, moe3d-tiny"),
    ],
)
def test_an_unknown_source_is_named_with_what_there_is(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source)


def test_a_preset_takes_no_config() -> None:
    with pytest.raises(InputError, match="preset 'moe3d-tiny' has its own config"):
        open_checkpoint("moe3d-tiny", config=PRESETS["moe3d-tiny"])


def test_a_file_is_read_with_the_config_beside_it_or_the_one_given(
    small: WeightSource, saved: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.symlink_to(saved / "model.safetensors")

    assert open_checkpoint(saved / "model.safetensors").config == small.config
    assert open_checkpoint(saved / "model.safetensors").name == "small-one"
    assert open_checkpoint(alone, config=small.config).name == "alone"
    with pytest.raises(CheckpointError, match=r"alone\.safetensors: weights do not fit .* Check the config"):
        open_checkpoint(alone)


def test_folders_without_their_files_say_what_to_name(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors; name a checkpoint folder or"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no config\.json; for VGGT-1B weights name .*safetensors itself"):
        open_checkpoint(tmp_path)
    (tmp_path / "weights.npz").touch()
    with pytest.raises(CheckpointError, match=r"weights\.npz: unknown kind of file; use \.safetensors"):
        open_checkpoint(tmp_path / "weights.npz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "expected an object, got list"),
        ('{"vit": {"embed": 3}}', "model config.vit: unknown key 'embed'"),
        ('{"licence": "a\\nb"}', "'licence' must be one line of text"),
        ('{"origin": 3}', "'origin' must be one line of text"),
        ('{"origin": ""}', "'origin' must be one line of text, got ''"),
        ('{"licence": " "}', "'licence' must be one line of text"),
        ('{"licence": "a\\u0007b"}', "'licence' must be one line of text"),
        ('{"origin": "\\ud800"}', "'origin' must be one line of text"),
        ('{"origin": "/data/vggt"}', "origin must be a base name, not a path of one machine, got '/data/vggt'"),
        ('{"origin": "~me/vggt"}', "origin must be a base name"),
        ('{"origin": "C:\\\\vggt"}', "origin must be a base name"),
    ],
)
def test_a_bad_config_is_refused_in_one_line(edited: Callable[..., Path], text: str, message: str) -> None:
    folder = edited(lambda tensors: None)
    (folder / "config.json").write_text(text)

    with pytest.raises(CheckpointError, match=rf"config\.json: {message}") as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("folder", "name", "origin"),
    [
        ("~x", "x", "-x"),
        (".hidden", "hidden", ".hidden"),
        ("two\nlines \x07", "two-lines-", "two-lines -"),
        ("file:C:\\vggt", "file-C-vggt", "file-C-vggt"),
        ("modèle 2", "mod-le-2", "modèle 2"),
        ("模型", "model", "模型"),
        (os.fsdecode(b"\xff"), "model", "-"),
        ("moe3d-1b_v1.2+x", "moe3d-1b_v1.2+x", "moe3d-1b_v1.2+x"),
    ],
)
def test_a_bundle_can_hold_the_name_and_origin_of_any_folder(
    saved: Path, tmp_path: Path, folder: str, name: str, origin: str
) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "model.safetensors").symlink_to(saved / "model.safetensors")
    config = json.loads((saved / "config.json").read_text())
    del config["origin"]
    (tmp_path / folder / "config.json").write_text(json.dumps(config))

    source = open_checkpoint(tmp_path / folder)

    assert (source.name, source.origin) == (name, origin)
    text = json.dumps([source.name, source.origin], ensure_ascii=False)
    assert text.encode("utf-8")  # fails for half a surrogate pair
    assert Checkpoint(source.origin, None, source.licence).origin == origin
    profile = Profile((1, 1, 14, 14), (1, 1, 14, 14), (1, 1, 14, 14))
    assert engine_name(source.name, profile, "fp16", [89], "tensorrt", "10").startswith(f"{name}_")


def test_pickles_are_refused_unless_asked_for(small: WeightSource, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": {name: small.tensor(name) for name in small.shapes()}}, path)

    with pytest.raises(CheckpointError, match=r"model\.pt: a pickle can run code .*, or --allow-pickle if you must"):
        open_checkpoint(path, config=small.config)
    with pytest.warns(Moe3dWarning, match="is a pickle"):
        source = open_checkpoint(path, config=small.config, allow_pickle=True)
    assert source.shapes() == small.shapes()
    assert source.licence == VGGT_LICENCE
    assert torch.equal(source.tensor(NORM), small.tensor(NORM))


# Keys and shapes


def test_tensors_that_do_not_fit_are_listed_three_at_most_with_the_closest_key(edited: Callable[..., Path]) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["camera_head.token_nrm.weight"] = tensors.pop(NORM)
        tensors[GAMMA] = torch.ones(7)
        for i in range(3):
            del tensors[f"depth_head.projects.{i}.bias"]

    with pytest.raises(CheckpointError) as error:
        open_checkpoint(edited(edit))

    message = str(error.value)
    assert f"unknown 'camera_head.token_nrm.weight' (closest known: '{NORM}')" in message
    assert f"missing '{NORM}' (128,)" in message
    assert message.count("missing") == 2
    assert "; and 3 more. Check the config.json beside the weights" in message


def test_a_misshapen_tensor_is_named_with_both_shapes(edited: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=rf"'{GAMMA}' is \(7,\), expected \(64,\)\. Check"):
        open_checkpoint(edited(lambda tensors: tensors.update({GAMMA: torch.ones(7)})))


@pytest.mark.parametrize(
    ("held", "wanted", "remedy"),
    [
        (8, 4, r"hold 8 experts, the config says 4: set moe\.num_experts in config\.json"),
        (4, 0, r"hold 4 experts, the config none: put their config\.json beside them"),
        (0, 4, 'hold no experts: set "moe" to null in config.json, then add them with moe3d convert'),
    ],
)
def test_another_number_of_experts_gets_its_own_remedy(
    small: WeightSource, held: int, wanted: int, remedy: str
) -> None:
    configs = [dataclasses.replace(small.config, moe=MoeConfig(k) if k else None) for k in (held, wanted)]

    with pytest.raises(CheckpointError, match=remedy):
        check_shapes("x", model_shapes(configs[0]), configs[1])


# Loading


def test_the_model_has_exactly_the_weights_of_the_source(small: WeightSource, saved: Path) -> None:
    model = load_model(open_checkpoint(saved))

    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, small.tensor(name)), name
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_dtypes_are_those_asked_for(small: WeightSource) -> None:
    model = load_model(small, dtype_of=lambda name: torch.float16 if "blocks" in name else torch.float32)

    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float16 if "blocks" in name else torch.float32)


def test_the_point_head_can_be_left_out_but_not_invented(small: WeightSource) -> None:
    without = dataclasses.replace(small.config, point_head=False)

    assert load_model(small, point_head=False).config == without
    assert load_model(small, point_head=True).config == small.config
    with pytest.raises(CheckpointError, match="x has no point head"):
        load_model(seeded_source("x", without), point_head=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_refused(edited: Callable[..., Path], value: float) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[NORM][5] = value

    source = open_checkpoint(edited(edit))
    with pytest.raises(CheckpointError, match=rf"tensor '{NORM}' holds NaN or infinite values"):
        load_model(source)


def test_values_beyond_float16_are_refused_there_and_nowhere_else(edited: Callable[..., Path]) -> None:
    source = open_checkpoint(edited(lambda tensors: tensors[NORM].fill_(-7e4)))

    with pytest.raises(CheckpointError, match=rf"'{NORM}' reaches 7e\+04, too large for torch\.float16; use float32"):
        load_model(source, dtype_of=lambda _: torch.float16)
    load_model(source, dtype_of=lambda _: torch.bfloat16)


def test_keys_are_checked_before_any_tensor_is_read() -> None:
    class Unreadable(WeightSource):
        def shapes(self) -> dict[str, tuple[int, ...]]:
            return {"other": (1,)}

        def tensor(self, name: str) -> Tensor:
            raise AssertionError(f"{name} was read")

        def sha256(self) -> str:
            return "0" * 64

    with pytest.raises(CheckpointError, match="unknown 'other'"):
        load_model(Unreadable(PRESETS["moe3d-tiny"], "x", "x", "x"))
