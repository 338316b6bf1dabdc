"""Faults of 16-bit rounding are found in the block that has them, and the blocks that have to stay float32 are."""

import math
from collections.abc import Collection
from pathlib import Path

import pytest
from faulty_weights import CONFIG, with_overflow
from hypothesis import given
from hypothesis import strategies as st
from models import small_model

from moe3d_deploy.benchmarks.bench.rounding_faults import block_of, blocks_of, search, smallest
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.export.precision import PRECISIONS, PrecisionPolicy

SHAPE = (1, 2, 3, 4)
TOLERANCE = 1e-2


def test_a_sound_model_has_no_faults(tmp_path: Path) -> None:
    found = search(with_overflow(tmp_path), "fp16", SHAPE, tolerance=TOLERANCE)
    assert found.first is None
    assert (found.broken, found.islands) == ((), ())
    assert all(0 < block.error < TOLERANCE for block in found.blocks)


def test_blocks_come_in_the_order_they_run(tmp_path: Path) -> None:
    names = [block.block for block in search(with_overflow(tmp_path), "fp16", SHAPE, tolerance=TOLERANCE).blocks]
    assert names[0] == "aggregator.patch_embed.patch_embed"
    frames = names.index("aggregator.frame_blocks.0")
    assert names[frames : frames + 3] == [
        "aggregator.frame_blocks.0",
        "aggregator.global_blocks.0",
        "aggregator.frame_blocks.1",
    ]
    assert names[-1] in ("depth_head.gate", "depth_head.experts.3")
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("block", ["aggregator.patch_embed.blocks.1", "aggregator.global_blocks.0"])
def test_a_planted_fault_is_found_in_its_block(tmp_path: Path, block: str) -> None:
    found = search(with_overflow(tmp_path, block), "fp16", SHAPE, tolerance=TOLERANCE)
    assert found.first is not None
    assert (found.first.block, found.first.error) == (block, math.inf)
    assert found.islands == (block,)
    assert found.broken[0].startswith("depth is off by inf (max relative), the limit is 0.01")


def test_two_faults_need_two_islands(tmp_path: Path) -> None:
    blocks = ("aggregator.frame_blocks.0", "aggregator.global_blocks.1")
    found = search(with_overflow(tmp_path, *blocks), "fp16", SHAPE, tolerance=TOLERANCE)
    assert found.first is not None
    assert found.first.block == blocks[0]
    assert sorted(found.islands) == sorted(blocks)


def test_what_fp16_cannot_hold_bf16_can(tmp_path: Path) -> None:
    found = search(with_overflow(tmp_path, "aggregator.global_blocks.0"), "bf16", SHAPE, tolerance=0.2)
    assert (found.first, found.broken, found.islands) == (None, (), ())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_has_no_16_bits_has_nothing_to_search(precision: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{precision} rounds nothing to 16 bits"):
        search(with_overflow(tmp_path), precision, SHAPE, tolerance=TOLERANCE)


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if PrecisionPolicy(name).sixteen_bit])
def test_every_16_bit_parameter_belongs_to_a_block(precision: str) -> None:
    model = small_model(CONFIG.moe)
    dtype_of = PrecisionPolicy(precision).dtype_of()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype_of(name))
    blocks = blocks_of(model)
    assert len(blocks) == len(set(blocks)) > 3
    for block in blocks:
        model.get_submodule(block)


@pytest.mark.parametrize(
    ("parameter", "block"),
    [
        ("aggregator.patch_embed.patch_embed.proj.weight", "aggregator.patch_embed.patch_embed"),
        ("aggregator.patch_embed.blocks.11.attn.qkv.weight", "aggregator.patch_embed.blocks.11"),
        ("aggregator.frame_blocks.3.mlp.fc1.bias", "aggregator.frame_blocks.3"),
        ("depth_head.scratch.refinenet2.resConfUnit1.conv1.weight", "depth_head.scratch.refinenet2"),
        ("depth_head.experts.2.0.weight", "depth_head.experts.2"),
        ("depth_head.gate.0.bias", "depth_head.gate"),
        ("depth_head.norm.weight", None),
        ("aggregator.camera_token", None),
    ],
)
def test_the_block_of_a_parameter(parameter: str, block: str | None) -> None:
    assert block_of(parameter) == block


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_what_is_needed_is_what_is_left(case: tuple[int, set[int]]) -> None:
    count, needed = case
    names = [str(index) for index in range(count)]
    asked: list[Collection[str]] = []

    def holds(kept: Collection[str]) -> bool:
        asked.append(kept)
        return {str(index) for index in needed} <= set(kept)

    assert smallest(names, holds) == sorted((str(index) for index in needed), key=int)
    assert len(asked) <= count**2 + 3 * count + 1  # the bound of Zeller and Hildebrandt


@given(st.lists(st.sets(st.integers(0, 11), min_size=1, max_size=4), min_size=1, max_size=5))
def test_none_of_several_ways_out_keeps_more_than_it_needs(ways: list[set[int]]) -> None:
    """Where any of several sets mends it, what is left does, and does not without any one of its blocks."""
    names = [str(index) for index in range(12)]

    def holds(kept: Collection[str]) -> bool:
        return any({str(index) for index in way} <= set(kept) for way in ways)

    found = smallest(names, holds)
    assert holds(found)
    assert not any(holds([name for name in found if name != left_out]) for left_out in found)


def test_a_fault_that_float32_does_not_mend_is_no_fault_of_rounding() -> None:
    with pytest.raises(Moe3dError, match="the fault is not one of rounding"):
        smallest(["a", "b"], lambda kept: False)
