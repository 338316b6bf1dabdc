"""config.json: VGGT's own and ours are understood, anything else is refused in one line."""

import dataclasses
import json
from pathlib import Path

import pytest
from checkpoints import small, tensors, write_folder

from moe3d_deploy.checkpoint import open_checkpoint
from moe3d_deploy.checkpoint_config import read_config
from moe3d_deploy.config import PRESETS
from moe3d_deploy.errors import CheckpointError

HUB = {
    "img_size": 518, "patch_size": 14, "embed_dim": 1024, "enable_camera": True, "enable_point": True,
    "enable_depth": True, "enable_track": True,
}  # fmt: skip


def refusal(folder: Path, text: str | bytes) -> str:
    """How this text is refused, without the path before it."""
    path = folder / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError) as error:
        read_config(path)
    message = str(error.value)
    assert message.isprintable()
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_vggts_own_config_json_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(HUB))
    assert read_config(path) == (PRESETS["vggt-1b"], {})
    path.write_text(json.dumps(HUB | {"enable_point": False, "enable_track": False}))
    assert read_config(path)[0] == dataclasses.replace(PRESETS["vggt-1b"], point_head=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 768}, "model config: embed_dim must be 1024, got 768; use VGGT-1B weights"),
        ({"embed_dim": "1024"}, "model config: embed_dim must be 1024, got '1024'; use VGGT-1B weights"),
        ({"enable_camera": False}, "model config: enable_camera must be True, got False; use VGGT-1B weights"),
        ({"enable_depth": False}, "model config: enable_depth must be True, got False; use VGGT-1B weights"),
        ({"enable_depth": 1}, "model config: enable_depth must be True, got 1; use VGGT-1B weights"),
        ({"enable_track": 1}, "model config: enable_track must be true or false, got 1"),
        ({"enable_point": 1}, "model config.point_head: expected bool, got 1"),
        ({"img_size": 500}, "model config: img_size must be a multiple of patch_size"),
        ({"architectures": ["VGGT"]}, "model config: unknown key 'architectures'; known are img_size, "),
    ],
)
def test_hub_arguments_that_no_model_here_has_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    assert refusal(tmp_path, json.dumps(HUB | changes)).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON: "),
        ("[" * 100_000, "is nested more than 32 deep; correct it, or copy or download it again"),
        ('{"vit":' * 100_000, "is nested more than 32 deep"),
        ("[]", "expected an object, got list"),
        ('{"img_size": 518, "img_size": 518}', "has the key 'img_size' twice"),
        ('{"vit": {"depth": 4, "depth": 5}}', "has the key 'depth' twice"),
        ('{"aggregator": {"rope_freq": NaN}}', "has NaN, which JSON does not allow"),
        ('{"aggregator": {"rope_freq": 1e999}}', "has a number that is not finite"),
        ('{"img_size": %s}' % ("9" * 5000), "has an integer beyond 64 bits"),
        ('{"vit": {"depth": 1000000000}}', "model config: vit.depth is 1e+09, beyond any model (at most 1000)"),
        (
            '{"moe": {"num_experts": 4611686018427387904}}',
            "model config.moe.num_experts: expected int, got 46116860184",
        ),
        (b"\xff", "is not UTF-8 text (byte 0)"),
        (b"", "is empty (0 bytes)"),
        ("<!DOCTYPE html>", "is a web page"),
        ("version https://git-lfs.github.com/spec/v1", "is a git-lfs pointer"),
        ('{"vit": {"embed": 3}}', "model config.vit: unknown key 'embed'"),
        ('{"licence": "a\\nb"}', "'licence' must be one line of text"),
        ('{"origin": 3}', "'origin' must be one line of text"),
        ('{"origin": ""}', "'origin' must be one line of text, got ''"),
        ('{"licence": " "}', "'licence' must be one line of text"),
        ('{"licence": "a\\u0007b"}', "'licence' must be one line of text"),
        ('{"origin": "\\ud800"}', "has a string that is not Unicode text"),
        ('{"origin": "/data/vggt"}', "origin must be a base name, not a path of one machine, got '/data/vggt'"),
        ('{"origin": "~me/vggt"}', "origin must be a base name"),
        ('{"origin": "C:\\\\vggt"}', "origin must be a base name"),
    ],
)
def test_a_bad_config_is_refused_in_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert refusal(tmp_path, text).startswith(message)


def test_a_config_larger_than_any_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, b"{" + b" " * (17 << 20) + b"}").startswith("has 17825794 bytes, more than 16777216")


def test_the_notes_are_those_of_the_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tensors(small()), None)
    notes = {"licence": "CC-BY-4.0", "origin": "my weights"}
    (folder / "config.json").write_text(json.dumps(small().config.to_dict() | notes))

    source = open_checkpoint(folder)
    assert (source.licence, source.origin) == ("CC-BY-4.0", "my weights")


def test_a_link_to_no_config_is_not_the_absence_of_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tensors(small()), None)
    (folder / "config.json").symlink_to("gone")

    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read \(No such file or directory\)"):
        open_checkpoint(folder)
