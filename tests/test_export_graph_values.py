"""The written ONNX file computes what PyTorch does."""

import exports
import numpy as np
import pytest
from exports import FILES, MOE

from moe3d_deploy.export.compare import Limits, errors, require_within
from moe3d_deploy.export.verify import images_for

# B, S, rows and columns in patches; none of them is what the tracer saw (2, 3, 4, 5).
SHAPES = [(1, 1, 1, 1), (2, 1, 3, 2), (1, 3, 2, 5), (2, 2, 1, 7), (1, 9, 2, 2), (3, 4, 5, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("file", ["fp32 merged", "fp32 plain"])
def test_the_file_computes_what_the_trained_form_does_in_pytorch(file: str, shape: tuple[int, int, int, int]) -> None:
    """5e-5 is the project's limit: float32 noise of this model is below 1e-5, a wrong operation above 1e-4."""
    exported = FILES[file]()
    images = images_for(shape, MOE.patch_size)

    found, expected = exported.run(images), exported.reference(images)

    require_within(file, errors(found, expected), Limits.of("fp32"), "")
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    assert np.isfinite(found["depth"]).all()
    assert found["depth"].std() > 0.01 * found["depth"].mean()  # a flat map would hide faults


@pytest.mark.parametrize("shape", [(2, 1, 3, 2), (1, 3, 2, 5)], ids=str)
def test_the_half_file_is_within_the_limits_of_half(shape: tuple[int, int, int, int]) -> None:
    exported = exports.bundle().exported
    images = images_for(shape, MOE.patch_size)
    error = errors(exported.run(images), exported.reference(images))
    require_within("fp16", error, Limits.of("fp16"), "")
    assert error["depth"]["max"] > 5e-5  # it is in half indeed


def test_scenes_of_a_batch_do_not_mix() -> None:
    """Float32 sums of a larger batch may be blocked in another way, no more."""
    images = images_for((3, 2, 2, 3), MOE.patch_size)
    together = exports.merged().run(images)
    for scene in range(3):
        alone = exports.merged().run(images[scene : scene + 1])
        for name, values in alone.items():
            np.testing.assert_allclose(together[name][scene], values[0], rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_weights_sum_to_one_and_the_optional_maps_agree_with_them() -> None:
    result = exports.merged().run(images_for((1, 2, 3, 4), MOE.patch_size))
    weights = result["expert_weights"]
    np.testing.assert_allclose(weights.sum(axis=2), 1, rtol=1e-6)
    np.testing.assert_allclose(result["expert_entropy"], -(weights * np.log(weights)).sum(axis=2), rtol=1e-4, atol=1e-6)
    assert (result["depth_variance"] >= 0).all()
