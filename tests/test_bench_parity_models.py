"""The models of a parity measurement compute in the precision that they are called by."""

import dataclasses

import exports
import numpy as np
import torch

from moe3d_deploy.benchmarks.bench.parity_inputs import random_pixels
from moe3d_deploy.benchmarks.bench.parity_models import Arrays, open_model
from moe3d_deploy.export.half import SixteenBitRun
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.export.verify import deployed_model
from moe3d_deploy.runtime.pixels import to_floats

PIXELS = random_pixels((1, 2, 28, 42), seed=0)
SOURCE = dataclasses.asdict(SourceSpec(str(exports.checkpoint())))


def outputs(precision: str) -> Arrays:
    opened = open_model({"kind": "pytorch", "source": SOURCE, "precision": precision, "outputs": ["expert_weights"]})
    assert opened.device == "cpu"
    return opened.run(PIXELS)


def test_float64_is_float64_throughout() -> None:
    with torch.no_grad():
        expected = exports.load().double()(torch.from_numpy(to_floats(PIXELS)).double())["depth"].numpy()
    found = outputs("fp64")
    assert found["depth"].dtype == np.float64
    assert np.array_equal(found["depth"], expected)
    assert not np.array_equal(found["depth"].astype(np.float32), found["depth"])


def test_sixteen_bits_are_rounded_as_a_gpu_does_in_the_exported_form() -> None:
    """Float32 sums and one rounding; torch's own half products on a CPU give other bits."""
    request = {"source": SOURCE, "policy": {"precision": "fp16"}, "outputs": [], "merge": True}
    model, images = deployed_model(request), torch.from_numpy(to_floats(PIXELS))
    with torch.no_grad():
        own = model(images)["depth"].numpy()
        with SixteenBitRun(model):
            expected = model(images)["depth"].numpy()
    found = outputs("fp16")["depth"]
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, own)


def test_the_weights_of_the_experts_come_with_the_outputs() -> None:
    assert outputs("bf16")["expert_weights"].shape == (1, 2, 2, 28, 42)
