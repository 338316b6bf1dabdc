"""The position embeddings against torch, the specification's formulas in float64, and hand-computed values."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import relative_error

from moe3d_deploy.model.embeddings import bicubic_matrix, resample_grid, rotary_table, uv_embedding
from moe3d_deploy.model.transformer import RotaryTable, rotate

SIZES = [(6, 6), (6, 9), (3, 4), (12, 5), (1, 1), (1, 7), (11, 2)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("stored", [6, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_grid_resampling_equals_torchs_antialiased_bicubic(
    stored: int, height: int, width: int, dtype: torch.dtype, tolerance: float
) -> None:
    """float32: weights near 1 rounded once or twice, and up to 12 x 12 taps."""
    grid = torch.randn((stored, stored, 5), generator=torch.Generator().manual_seed(1)).to(dtype)

    actual = resample_grid(grid, height, width)

    image = grid.movedim(2, 0)[None]
    expected = F.interpolate(image, size=(height, width), mode="bicubic", antialias=True)[0].movedim(0, 2)
    assert relative_error(actual, expected) < tolerance


@pytest.mark.parametrize("stored", [1, 4, 18, 37])
def test_grid_of_the_stored_size_is_used_unchanged(stored: int) -> None:
    grid = torch.randn((stored, stored, 3), generator=torch.Generator().manual_seed(2))

    assert torch.equal(resample_grid(grid, stored, stored), grid)


def test_bicubic_weights_by_hand() -> None:
    """Two to three: centres 1/3, 1, 5/3. Keys' kernel at the distances of the taps 1/2 and 3/2, over their sum."""

    def keys(x: float) -> float:
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2

    near, far = keys(1 / 6), keys(7 / 6)
    a, b = near / (near + far), far / (near + far)
    expected = torch.tensor([[a, b], [0.5, 0.5], [b, a]], dtype=torch.float64)

    torch.testing.assert_close(bicubic_matrix(2, 3, expected), expected, rtol=0, atol=1e-15)


def test_rotary_angles_by_hand() -> None:
    """Head width 8: two frequencies, 1 and 100^(-1/2) = 0.1. The patch in row 1, column 2 sits at y = 2, x = 3."""
    table = rotary_table(2, 3, 5, 8, 100.0, torch.zeros((), dtype=torch.float64))

    assert table.cos.shape == table.signed_sin.shape == (5 + 6, 8)
    angles = [2, 0.2, 2, 0.2, 3, 0.3, 3, 0.3]
    signs = [-1, -1, 1, 1, -1, -1, 1, 1]
    expected_cos = torch.tensor([math.cos(a) for a in angles], dtype=torch.float64)
    expected_sin = torch.tensor([s * math.sin(a) for s, a in zip(signs, angles, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(table.cos[5 + 1 * 3 + 2], expected_cos, rtol=0, atol=1e-15)
    torch.testing.assert_close(table.signed_sin[5 + 1 * 3 + 2], expected_sin, rtol=0, atol=1e-15)


def test_special_tokens_are_not_rotated() -> None:
    table = rotary_table(2, 2, 5, 8, 100.0, torch.zeros(()))
    x = torch.randn((9, 8), generator=torch.Generator().manual_seed(3))

    assert torch.equal(rotate(x, table)[:5], x[:5])


def test_rotation_turns_pairs_that_lie_half_a_half_apart() -> None:
    """A quarter turn of y alone: channel j of the y half becomes -t[j + 2], channel j + 2 becomes t[j]."""
    cos = torch.tensor([[0.0] * 4 + [1.0] * 4])
    signed_sin = torch.tensor([[-1.0, -1.0, 1.0, 1.0] + [0.0] * 4])
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])

    turned = rotate(x, RotaryTable(cos, signed_sin))

    assert turned.tolist() == [[-3.0, -4.0, 1.0, 2.0, 5.0, 6.0, 7.0, 8.0]]


@pytest.mark.parametrize(("height", "width"), [(3, 5), (1, 1), (10, 14), (70, 98), (37, 4)])
@pytest.mark.parametrize("aspect", [1.0, 518 / 154, 0.25])
def test_uv_embedding_equals_the_specifications_formula(height: int, width: int, aspect: float) -> None:
    """The formula of the specification in float64; three roundings in float32 of angles below 1 are 2e-7."""
    channels = 16
    diagonal = math.sqrt(aspect**2 + 1)
    su, sv = aspect / diagonal * (width - 1) / width, 1 / diagonal * (height - 1) / height
    u, v = np.meshgrid(np.linspace(-su, su, width), np.linspace(-sv, sv, height))
    omega = 100.0 ** (-np.arange(channels // 4) / (channels // 4))
    angle_u, angle_v = omega[:, None, None] * u, omega[:, None, None] * v
    expected = np.concatenate([np.sin(angle_u), np.cos(angle_u), np.sin(angle_v), np.cos(angle_v)])

    actual = uv_embedding(height, width, channels, torch.tensor(aspect))

    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=2e-7)
