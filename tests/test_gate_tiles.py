"""How many experts tiles need, on gates with a known answer."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from moe3d_deploy.benchmarks import gate_tiles
from moe3d_deploy.benchmarks.gate_tiles import BOUNDS, SIDES, largest_in_tiles, tiles_needed
from moe3d_deploy.errors import InputError


def test_the_largest_of_every_tile_with_smaller_ones_at_the_edges() -> None:
    weights = np.zeros((1, 1, 10, 9), np.float32)
    weights[0, 0, 0, 0], weights[0, 0, 9, 8], weights[0, 0, 7, 8] = 1, 2, 3
    np.testing.assert_array_equal(largest_in_tiles(weights, 8)[0, 0], [[1, 3], [0, 2]])
    rng = np.random.default_rng()
    random = rng.random((2, 3, 16, 24))
    blocks = random.reshape(2, 3, 2, 8, 3, 8).max(axis=(3, 5))
    np.testing.assert_array_equal(largest_in_tiles(random, 8), blocks)


def test_a_hard_gate_needs_one_expert_and_an_even_one_all() -> None:
    hard = np.zeros((2, 4, 32, 64), np.float32)
    hard[:, 0, :, :32], hard[:, 1, :, 32:] = 1, 1
    even = np.full((2, 4, 32, 64), 0.25, np.float32)
    for row in tiles_needed([hard]):
        assert (row["needed"], row["at_most_two"]) == (0.25, 1.0)
    for row in tiles_needed([even]):
        assert (row["needed"], row["at_most_two"]) == (1.0, 0.0)
    rows = tiles_needed([hard, even])
    assert [(row["side"], row["bound"]) for row in rows] == [(side, bound) for side in SIDES for bound in BOUNDS]
    assert {(row["needed"], row["at_most_two"]) for row in rows} == {(0.625, 0.5)}


def test_what_leaving_experts_out_moves_is_what_is_said() -> None:
    """No pixel by more than (K - 1) bound times the distance between the nearest and the farthest expert."""
    rng = np.random.default_rng()
    logits = rng.normal(0, 4, (1, 4, 64, 64))
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    depths = rng.uniform(1, 20, weights.shape)
    for bound in BOUNDS:
        kept = np.where(np.kron(largest_in_tiles(weights, 8) > bound, np.ones((8, 8))) > 0, weights, 0)
        moved = np.abs((kept * depths).sum(1) / kept.sum(1) - (weights * depths).sum(1))
        assert (moved <= 3 * bound * (depths.max(1) - depths.min(1)) + 1e-12).all()


def test_no_scene_is_refused() -> None:
    with pytest.raises(InputError, match="no scene"):
        tiles_needed([])


def test_the_command_writes_what_the_table_shows(tmp_path: Path) -> None:
    out = tmp_path / "tiles.json"
    ended = CliRunner().invoke(
        gate_tiles.main, ["moe3d-tiny", "--count", "1", "--views", "1", "--out", str(out)], catch_exceptions=False
    )
    assert ended.exit_code == 0, ended.output
    report = json.loads(out.read_text())
    assert report["model"]["num_experts"] == 4
    assert len(gate_tiles.table(report).splitlines()) == 2 + len(SIDES) * len(BOUNDS)
    with pytest.raises(InputError, match="vggt-1b has no experts"):
        CliRunner().invoke(gate_tiles.main, ["vggt-1b", "--out", str(out)], catch_exceptions=False)
