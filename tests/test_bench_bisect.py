"""`moe3d bench --bisect`: what it prints of a planted fault, how it ends, and what it refuses."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from faulty_weights import with_overflow

from moe3d_deploy.cli.bench import bench_command
from moe3d_deploy.errors import InputError

BLOCK = "aggregator.global_blocks.0"
SMALL = ("--shapes", "1x2x42x56")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(bench_command, [str(argument) for argument in arguments])


def refusal(*arguments: object) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


def test_a_planted_fault_is_printed_with_what_mends_it(tmp_path: Path) -> None:
    result = run(with_overflow(tmp_path, BLOCK).source, "--bisect", "fp16", *SMALL)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0].endswith("in fp16 at 1x2x42x56: 37 blocks in 16 bits, compared with float32")
    assert f"first        {BLOCK} inf, beyond 0.01" in lines
    assert lines[3].startswith("before       aggregator.frame_blocks.0 ")
    assert lines[-1].startswith(f"islands      float32 in {BLOCK} mends it")


def test_a_sound_model_ends_with_0_and_says_how_far_it_is(tmp_path: Path) -> None:
    result = run(with_overflow(tmp_path).source, "--bisect", "fp16", *SMALL)
    assert result.exit_code == 0, result.output
    assert "blocks       all within 0.01; furthest " in result.stdout
    assert result.stdout.splitlines()[-1] == "outputs      within the limits of the precision"


def test_a_smaller_tolerance_finds_the_first_block_that_rounds(tmp_path: Path) -> None:
    result = run(with_overflow(tmp_path).source, "--bisect", "fp16", *SMALL, "--tolerance", "1e-9")
    assert result.exit_code == 0
    assert "first        aggregator.patch_embed.patch_embed " in result.stdout


def test_json_holds_every_block_and_null_for_what_is_not_finite(tmp_path: Path) -> None:
    result = run(with_overflow(tmp_path, BLOCK).source, "--bisect", "fp16", *SMALL, "--json")
    found = json.loads(result.stdout)
    assert (found["first"], found["islands"], found["shape"]) == (BLOCK, [BLOCK], "1x2x42x56")
    errors = {block["block"]: block["error"] for block in found["blocks"]}
    assert errors[BLOCK] is None
    assert 0 < errors["aggregator.frame_blocks.0"] < 0.01


def test_what_it_cannot_use_is_refused(tmp_path: Path) -> None:
    source = with_overflow(tmp_path).source
    assert refusal("--bisect", "fp16") == "--bisect searches one checkpoint or preset; name it alone"
    assert "--bisect has no use for --runs" in refusal(source, "--bisect", "fp16", "--runs", "3")
    assert "multiples of the patch size, 14" in refusal(source, "--bisect", "fp16", "--shapes", "1x1x43x56")
    assert "give one --shapes" in refusal(source, "--bisect", "fp16", "--shapes", "1x1x42x56,1x2x42x56")
    assert refusal(source, "--tolerance", "0.1") == "--tolerance is for --bisect; leave it out"


def test_a_bundle_has_no_weights_to_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe3d_deploy.cli.bench_bisect.is_bundle", lambda source: True)
    assert "name the checkpoint it was made of" in refusal(tmp_path, "--bisect", "fp16")
