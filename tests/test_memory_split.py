"""Memory of a model in two files: hand counts, and the larger part as the peak. Engines: test_memory_engine.py."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe3d_deploy.config import PRESETS
from moe3d_deploy.errors import InputError
from moe3d_deploy.memory import activation_bytes
from moe3d_deploy.memory_split import split_activation_bytes, split_memory

TINY = dataclasses.replace(PRESETS["moe3d-tiny"], point_head=False)  # patches of 7, 128 channels
MOE3D_1B = dataclasses.replace(PRESETS["moe3d-1b"], point_head=False)
SHAPE = (1, 8, 252, 252)


def test_tokens_between_the_parts_are_float32_of_every_patch_of_all_views() -> None:
    """36 x 36 patches in each of 8 views; four levels of 2 x 128 channels, or one of 128."""
    for precision in ("fp32", "fp16"):
        heads = split_memory(TINY, SHAPE, "heads", form="fused", precision=precision, view_chunk=1)
        encoder = split_memory(TINY, SHAPE, "encoder", form="fused", precision=precision)
        assert {part.between_bytes for part in heads} == {8 * 36 * 36 * 4 * 256 * 4}
        assert {part.between_bytes for part in encoder} == {8 * 36 * 36 * 128 * 4}


def test_a_level_that_two_read_flows_once() -> None:
    head = dataclasses.replace(TINY.dpt_head, intermediate_layer_idx=(0, 0, 2, 2))
    parts = split_memory(dataclasses.replace(TINY, dpt_head=head), SHAPE, "heads", form="fused", precision="fp32")
    assert parts[0].between_bytes == 8 * 36 * 36 * 2 * 256 * 4


def test_only_the_part_that_is_per_view_is_chunked() -> None:
    heads = split_memory(TINY, (2, 4, 252, 252), "heads", form="fused", precision="fp16", view_chunk=3)
    assert [(part.role, part.shape) for part in heads] == [
        ("aggregator", (2, 4, 252, 252)),
        ("heads", (1, 3, 252, 252)),
    ]
    encoder = split_memory(TINY, (2, 4, 252, 252), "encoder", form="fused", precision="fp16", view_chunk=100)
    assert [(part.role, part.shape) for part in encoder] == [
        ("encoder", (1, 8, 252, 252)),
        ("decoder", (2, 4, 252, 252)),
    ]


def test_the_peak_is_that_of_the_part_that_needs_more() -> None:
    one, all_views = (
        split_memory(TINY, SHAPE, "heads", form="fused", precision="fp16", view_chunk=chunk) for chunk in (1, None)
    )
    assert one[0] == all_views[0]
    for parts, chunk in ((one, 1), (all_views, None)):
        peak = max(part.activation_bytes for part in parts) + parts[0].between_bytes
        found = split_activation_bytes(TINY, SHAPE, "heads", form="fused", precision="fp16", view_chunk=chunk)
        assert found == peak
    assert all_views[1].activation_bytes > 4 * one[1].activation_bytes > one[0].activation_bytes
    whole = activation_bytes(TINY, SHAPE, form="fused", precision="fp16")
    assert one[1].peak_bytes < whole < all_views[1].peak_bytes + one[0].activation_bytes


@settings(max_examples=30, deadline=None)
@given(
    split=st.sampled_from(["heads", "encoder"]),
    form=st.sampled_from(["fused", "explicit"]),
    views=st.integers(1, 9),
    chunk=st.integers(1, 9),
    rows=st.integers(1, 12),
)
def test_larger_chunks_and_more_views_never_need_less(split: str, form: str, views: int, chunk: int, rows: int) -> None:
    def peak(count: int, at_a_time: int | None) -> int:
        shape = (1, count, 14 * rows, 70)
        return split_activation_bytes(TINY, shape, split, form=form, precision="fp32", view_chunk=at_a_time)

    assert peak(views, chunk) <= peak(views, chunk + 1) <= peak(views, None)
    assert peak(views, chunk) <= peak(views + 1, chunk)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_no_part_needs_more_than_the_whole_engine(precision: str) -> None:
    """Inputs and outputs of a part are the caller's: what is left is work that the whole does too."""
    shape = (1, 8, 392, 518)
    whole = activation_bytes(MOE3D_1B, shape, form="fused", precision=precision)
    for role in ("aggregator", "heads", "encoder", "decoder"):
        assert 0 < activation_bytes(MOE3D_1B, shape, form="fused", precision=precision, part=role) <= whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "middle"}, "split 'middle' is unknown; choose from heads, encoder"),
        ({"view_chunk": 0}, "view_chunk must be at least 1, got 0"),
        ({"form": "eager"}, "form 'eager' is PyTorch, which runs whole models and no part 'aggregator'"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: dict[str, Any], message: str) -> None:
    given_: dict[str, Any] = {"split": "heads", "form": "fused", "precision": "fp32"} | arguments
    with pytest.raises(InputError) as caught:
        split_memory(TINY, SHAPE, **given_)
    assert str(caught.value).startswith(message)


def test_a_part_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        activation_bytes(TINY, SHAPE, form="fused", part="tail")
    assert str(caught.value) == "part 'tail' is unknown; choose from aggregator, heads, encoder, decoder"
