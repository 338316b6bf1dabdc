"""Seeded weights: the published bits, whatever the block size, in little memory."""

import hashlib
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from moe3d_deploy.errors import InputError
from moe3d_deploy.seeded import salted_tensor, seeded_tensor

# Key, salt, shape, first three values, float64 sum: the check values published with the generator.
CHECKS = [
    ("aggregator.patch_embed.pos_embed", "", [1, 1370, 1024], [-0.31623849, -0.2817468, -0.011857881], -383.300985),
    ("aggregator.patch_embed.cls_token", "", [1, 1, 1024], [0.00071116583, 0.012361094, 0.026725119], -0.181561),
    (
        "aggregator.frame_blocks.0.attn.qkv.weight",
        "",
        [3072, 1024],
        [-0.0083805528, -0.045685031, -0.048208758],
        -102.944824,
    ),
    ("aggregator.frame_blocks.0.attn.q_norm.weight", "", [64], [1.1221761, 0.82953024, 0.86687392], 64.992139),
    ("aggregator.global_blocks.23.ls2.gamma", "", [1024], [0.36409488, 0.25568298, 0.26211673], 306.889628),
    ("camera_head.empty_pose_tokens", "", [1, 1, 9], [-0.54210567, -0.45602241, 0.53755933], 0.152253),
    ("camera_head.pose_branch.fc2.bias", "", [9], [0.0063679889, 0.001833461, 0.031604934], 0.733711),
    (
        "depth_head.resize_layers.0.weight",
        "",
        [256, 256, 4, 4],
        [-0.074456386, -0.00033319087, -0.026792053],
        -149.884096,
    ),
    ("depth_head.scratch.output_conv2.2.weight", "", [2, 32, 1, 1], [0.14931375, 0.2753692, -0.13533336], 1.731164),
    ("aggregator.patch_embed.pos_embed", "demo", [1, 1370, 1024], [-0.048929974, 0.32815686, 0.17487943], 76.526875),
    ("aggregator.patch_embed.cls_token", "demo", [1, 1, 1024], [0.010941821, -0.014184709, 0.026019504], -0.414993),
    (
        "aggregator.frame_blocks.0.attn.qkv.weight",
        "demo",
        [3072, 1024],
        [-0.031437289, 0.032301337, -0.022022186],
        -33.575260,
    ),
    ("aggregator.frame_blocks.0.attn.q_norm.weight", "demo", [64], [0.89525908, 0.8872143, 1.0409679], 64.985249),
    ("aggregator.global_blocks.23.ls2.gamma", "demo", [1024], [0.26759583, 0.30382255, 0.36661649], 306.842790),
    ("camera_head.empty_pose_tokens", "demo", [1, 1, 9], [-0.71206427, 0.57512498, -0.35193774], 1.612514),
    ("camera_head.pose_branch.fc2.bias", "demo", [9], [0.0012610779, -0.030078549, 0.014214417], 0.814915),
    (
        "depth_head.resize_layers.0.weight",
        "demo",
        [256, 256, 4, 4],
        [-0.00079701009, -0.080885164, -0.0552787],
        37.886928,
    ),
    (
        "depth_head.scratch.output_conv2.2.weight",
        "demo",
        [2, 32, 1, 1],
        [-0.11456437, -0.22305505, 0.17963263],
        1.990258,
    ),
]

# SHA-256 over the tensors of tiny_state_dict.json, in its order, from the generator that made the golden files.
TINY_DIGESTS = {
    0: "bd4d8950bd0fb5dd2e98e161fa0aadac39de65912618e29b9d3fef9ca3257634",
    7: "82044d698ded1256432f66253608801afb7a2e258bbadc22cf57fc3010f8f9bc",
}


@pytest.mark.parametrize(("name", "salt", "shape", "first", "total"), CHECKS)
def test_published_check_values_come_out(
    name: str, salt: str, shape: list[int], first: list[float], total: float
) -> None:
    tensor = salted_tensor(name, shape, salt)

    assert tensor.shape == tuple(shape)
    assert tensor.dtype == np.float32
    np.testing.assert_allclose(tensor.ravel()[:3], first, rtol=6e-8)  # printed with 8 digits
    assert tensor.sum(dtype=np.float64) == pytest.approx(total, abs=6e-7)  # printed with 6 decimals


@pytest.mark.parametrize("seed", TINY_DIGESTS)
def test_every_golden_weight_is_equal_to_the_last_bit(data_dir: Path, seed: int) -> None:
    shapes = json.loads((data_dir / "tiny_state_dict.json").read_text())

    digest = hashlib.sha256()
    for name, shape in shapes.items():
        digest.update(seeded_tensor(name, shape, seed).tobytes())

    assert digest.hexdigest() == TINY_DIGESTS[seed]


def test_seed_zero_has_no_salt_and_another_seed_is_its_digits() -> None:
    np.testing.assert_array_equal(seeded_tensor("a.weight", (3, 5)), salted_tensor("a.weight", (3, 5), ""))
    np.testing.assert_array_equal(seeded_tensor("a.weight", (3, 5), 12), salted_tensor("a.weight", (3, 5), "12"))


def test_blocks_leave_no_trace() -> None:
    """A tensor longer than a block starts with the same values as one that is not."""
    long, short = (salted_tensor("x.weight", (rows, 7), "") for rows in (100_003, 4_001))

    np.testing.assert_array_equal(long[:4_001], short)
    assert len(np.unique(long)) > 0.95 * long.size  # no block is repeated; 24-bit results do collide now and then


@pytest.mark.parametrize(
    ("name", "shape", "scale"),
    [
        ("camera_head.pose_branch.fc1.weight", (1024, 2048), 1 / math.sqrt(2048)),
        ("camera_head.pose_branch.fc2.weight", (9, 1024), 0.3 / math.sqrt(1024)),
        ("depth_head.resize_layers.1.weight", (128, 64, 2, 2), 1 / math.sqrt(128)),
        ("depth_head.resize_layers.3.weight", (128, 64, 3, 3), 1 / math.sqrt(64 * 9)),
        ("depth_head.experts.2.0.weight", (32, 128, 3, 3), 1 / math.sqrt(128 * 9)),
        ("aggregator.patch_embed.mask_token", (1, 4096), 0.02),
        ("depth_head.gate.0.bias", (4096,), 0.02),
    ],
)
def test_spread_follows_the_role_of_the_tensor(name: str, shape: tuple[int, ...], scale: float) -> None:
    tensor = seeded_tensor(name, shape).astype(np.float64)

    # A uniform sample's standard deviation errs by sqrt(0.2 / n): 0.7 % for n = 4096; five times that.
    assert tensor.std() == pytest.approx(scale, rel=5 * math.sqrt(0.2 / tensor.size))
    assert np.abs(tensor).max() <= math.sqrt(3) * scale * (1 + 1e-7)


def test_scalars_and_empty_tensors_have_their_shape() -> None:
    assert salted_tensor("x", (), "").shape == ()
    assert salted_tensor("x.weight", (0, 4), "").shape == (0, 4)


def test_memory_is_the_result_and_small_buffers() -> None:
    tracemalloc.start()
    try:
        tensor = seeded_tensor("x.weight", (2000, 1000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < tensor.nbytes + 2**20


def test_negative_seed_is_refused() -> None:
    with pytest.raises(InputError, match="seed -1 is negative; use an integer >= 0"):
        seeded_tensor("x", (1,), -1)
