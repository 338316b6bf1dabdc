"""Input that the model cannot take is refused in one line, before anything is computed."""

import pytest
import torch
from models import small_model

from moe3d_deploy.config import MoeConfig
from moe3d_deploy.errors import InputError
from moe3d_deploy.model import MoE3D
from moe3d_deploy.model.moe3d import OF_EXPERTS, OF_POINT_HEAD


@pytest.fixture(scope="module")
def model() -> MoE3D:
    """A model that fails, rather than computes, when its input passes."""
    model = small_model(MoeConfig(), point_head=False)
    model.aggregator.encode = lambda images: pytest.fail("the input was accepted")  # type: ignore[assignment, method-assign]
    return model


IMAGES = torch.zeros(1, 1, 3, 14, 14)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 28, 28), r"images: expected \(B, S, 3, H, W\), got \(3, 28, 28\)"),
        ((1, 1, 1, 3, 28, 28), r"images: expected \(B, S, 3, H, W\), got \(1, 1, 1, 3, 28, 28\)"),
        ((1, 2, 28, 28, 3), r"images: expected \(B, S, 3, H, W\), got \(1, 2, 28, 28, 3\)"),
        ((2, 4, 28, 28), r"images: expected \(B, S, 3, H, W\), got \(1, 2, 4, 28, 28\)"),
        ((1, 1, 3, 28, 30), "images: 30x28 is not a multiple of 14 on both sides; resize them"),
        ((1, 1, 3, 27, 28), "images: 28x27 is not a multiple of 14 on both sides; resize them"),
        ((1, 0, 3, 28, 28), r"images: \(1, 0, 3, 28, 28\) holds no pixel; pass at least one view of at least 14x14"),
        ((0, 1, 3, 28, 28), r"images: \(0, 1, 3, 28, 28\) holds no pixel; pass at least one view of at least 14x14"),
        ((1, 1, 3, 0, 28), r"images: \(1, 1, 3, 0, 28\) holds no pixel; pass at least one view of at least 14x14"),
    ],
    ids=str,
)
def test_images_of_a_wrong_shape_are_refused(model: MoE3D, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        model(torch.zeros(shape))
    with pytest.raises(InputError, match=f"^{message}$"):
        model.features(torch.zeros(shape))


def test_bytes_are_refused(model: MoE3D) -> None:
    with pytest.raises(
        InputError, match=r"^images: expected floats in \[0, 1\], got torch.uint8; divide by 255 first$"
    ):
        model(IMAGES.to(torch.uint8))


def test_an_unknown_output_is_refused_with_the_known_ones(model: MoE3D) -> None:
    with pytest.raises(InputError, match=r"^output 'normals' is unknown; choose from depth, .*, depth_variance$"):
        model(IMAGES, outputs=["depth", "normals"])


@pytest.mark.parametrize("name", OF_EXPERTS)
def test_expert_outputs_without_experts_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"^output '{name}' needs experts; this model has none \(moe is null\)$"):
        small_model()(IMAGES, outputs=[name])


@pytest.mark.parametrize("name", OF_POINT_HEAD)
def test_point_outputs_without_a_point_head_are_refused(model: MoE3D, name: str) -> None:
    with pytest.raises(InputError, match=f"^output '{name}' needs the point head; this model has none$"):
        model(IMAGES, outputs=[name])


@pytest.mark.parametrize("view_chunk", [0, -8])
def test_a_chunk_without_views_is_refused(model: MoE3D, view_chunk: int) -> None:
    with pytest.raises(InputError, match=f"^view_chunk must be at least 1, got {view_chunk}$"):
        model(IMAGES, view_chunk=view_chunk)
