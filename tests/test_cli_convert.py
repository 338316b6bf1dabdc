"""`moe3d convert`: writes a folder that opens, says what it did, and refuses in one line."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import tensors, write_folder, write_shards

from moe3d_deploy.checkpoint import open_checkpoint, save_checkpoint, seeded_source
from moe3d_deploy.cli.main import main
from moe3d_deploy.cli.notices import warnings_as_lines
from moe3d_deploy.config import PRESETS, ModelConfig
from moe3d_deploy.errors import Moe3dWarning


@pytest.fixture(scope="module")
def vggt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VGGT checkpoint folder."""
    values = PRESETS["moe3d-tiny"].to_dict() | {"moe": None}
    folder = tmp_path_factory.mktemp("convert") / "small-vggt"
    save_checkpoint(seeded_source("small-vggt", ModelConfig.from_dict(values)), folder)
    return folder


def test_vggt_weights_get_experts(vggt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--experts", "3", "--noise", "0.1", "--temperature", "2", "--seed", "5", "--dtype", "bfloat16"]

    assert main(["convert", str(vggt), "-o", str(out), *arguments]) == 0

    written = open_checkpoint(out)
    moe = written.config.moe
    assert moe is not None
    assert (moe.num_experts, moe.temperature) == (3, 2.0)
    assert written.origin.endswith("3 experts added (noise 0.1, seed 5)")
    assert written.tensor("depth_head.experts.2.0.weight").dtype == torch.bfloat16
    printed = capsys.readouterr().out
    assert "licence      seeded random weights, no licence\n" in printed
    assert "experts      3, made from VGGT's depth head, not trained yet\n" in printed
    assert f"M parameters, 11 MB bfloat16\nnext         moe3d-export {out} -o bundle\n" in printed


def test_keep_vggt_adds_no_experts(vggt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(vggt), "-o", str(tmp_path), "--keep-vggt"]) == 0

    assert open_checkpoint(tmp_path).config.moe is None
    assert "experts      none\n" in capsys.readouterr().out


def test_a_preset_is_written_with_its_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "moe3d-tiny", "-o", str(tmp_path / "tiny"), "--seed", "2"]) == 0

    assert open_checkpoint(tmp_path / "tiny").origin == "preset:moe3d-tiny seed 2"
    assert "experts      4, kept as they are\n" in capsys.readouterr().out


def test_noise_for_experts_that_are_kept_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "moe3d-tiny", "-o", str(tmp_path / "tiny"), "--noise", "0.1"]) == 2

    assert "moe3d-tiny has experts, which are kept as they are, so --noise has no meaning" in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep-vggt", "--experts", "4"], "--keep-vggt adds no experts, so --experts has no meaning"),
        (["--experts", "0"], "'--experts': 0 is not in the range x>=1"),
        (["--noise", "-1"], "'--noise'"),
        (["--temperature", "0"], "'--temperature'"),
        (["--temperature", "inf"], "moe3d: gate temperature must be a number > 0, got inf"),
        (["--temperature", "nan"], "got nan"),
        (["--noise", "nan"], "got nan"),
        (["--experts", "1001"], "moe.num_experts is 1001, beyond any model (at most 1000)"),
        (["--dtype", "int8"], "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
    ],
)
def test_bad_options_end_with_code_2(
    vggt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["convert", str(vggt), "-o", str(tmp_path / "out"), *arguments]) == 2

    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_checkpoint_needs_overwrite(vggt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(vggt), "-o", str(tmp_path)]
    assert main(command) == 0
    capsys.readouterr()

    assert main(command) == 2
    assert capsys.readouterr().err.endswith("exists already; choose another folder or ask to overwrite it\n")
    assert main([*command, "--overwrite"]) == 0


def test_pickles_need_a_flag(vggt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_checkpoint(vggt)
    path = tmp_path / "model.pt"
    torch.save({name: source.tensor(name) for name in source.shapes()}, path)
    (tmp_path / "config.json").write_bytes((vggt / "config.json").read_bytes())
    command = ["convert", str(path), "-o", str(tmp_path / "out")]

    assert main(command) == 2
    assert "--allow-pickle" in capsys.readouterr().err
    assert main([*command, "--allow-pickle"]) == 0
    first, _, rest = capsys.readouterr().err.partition("\n")
    assert first == f"warning: {path} is a pickle; prefer model.safetensors where there is one"
    assert ".py" not in rest
    assert "warn" not in rest
    assert open_checkpoint(tmp_path / "out").config.moe is not None


def test_shards_without_a_config_become_one_file_with_one(
    vggt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", tensors(open_checkpoint(vggt)))

    assert main(["convert", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--keep-vggt"]) == 0

    written, original = open_checkpoint(tmp_path / "out"), open_checkpoint(vggt)
    assert written.config == original.config
    assert all(torch.equal(written.tensor(name), original.tensor(name)) for name in original.shapes())
    streams = capsys.readouterr()
    assert streams.err.startswith(
        f"warning: {tmp_path / 'in'}: no config.json; its tensors have the sizes of moe3d-tiny"
    )
    assert "licence      VGGT weights: Meta's VGGT licence" in streams.out


def test_unusable_weights_end_with_code_2_one_line_and_no_folder(
    vggt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tensors(open_checkpoint(vggt))
    weights["camera_head.token_norm.weight"][0] = float("nan")
    write_folder(tmp_path / "in", weights, open_checkpoint(vggt).config)

    assert main(["convert", str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 2

    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(
        "moe3d: in-moe4: tensor 'camera_head.token_norm.weight' holds NaN or infinite values; use undamaged weights"
    )
    assert not (tmp_path / "out").exists()


def test_only_the_projects_own_warnings_become_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught, warnings_as_lines():
        for _ in range(2):  # a loop warns from one place, of which Python by itself shows one
            warnings.warn("own\nwarning", Moe3dWarning, stacklevel=1)
        warnings.warn("of another library", UserWarning, stacklevel=1)

    assert capsys.readouterr().err == "warning: own warning\n" * 2
    assert [str(warning.message) for warning in caught] == ["of another library"]


def test_after_the_block_warnings_are_pythons_again(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings_as_lines():
        pass
    with pytest.warns(Moe3dWarning, match="later"):
        warnings.warn("later", Moe3dWarning, stacklevel=1)

    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("package", ["torch", "safetensors"])
def test_a_missing_package_names_the_extra(package: str, tmp_path: Path) -> None:
    script = (
        "import sys; from moe3d_deploy.cli.main import main; "
        f"sys.modules[{package!r}] = None; sys.exit(main(['convert', 'moe3d-tiny', '-o', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)

    expected = f"moe3d: {package} is not installed: pip install 'moe3d-deploy[export]'\n"
    assert (result.returncode, result.stderr) == (1, expected)
    assert not (tmp_path / "out").exists()


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys; from moe3d_deploy.cli.main import main; "
        "code = main(['convert', '--help']); sys.exit(code or 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    assert "moe3d convert moe3d-tiny -o tiny" in result.stdout
