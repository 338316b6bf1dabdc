"""The models of a parity measurement, ready to run: PyTorch in any precision, a bundle in ONNX Runtime, an engine."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.runtime.pixels import to_floats

Arrays = Mapping[str, NDArray[Any]]


class Opened(NamedTuple):
    """device, "cpu" or "cuda", and `run`: pixels (B, S, H, W, 3) uint8 -> every output by name."""

    device: str
    run: Callable[[NDArray[np.uint8]], Arrays]


def open_model(model: Mapping[str, Any]) -> Opened:
    """What a request names, loaded.

    kind "pytorch"  source of `SourceSpec`, precision (one of PRECISIONS, or fp64), outputs
    kind "bundle"   path
    kind "engine"   path of its bundle, file

    Raises what loading raises.
    """
    opened = {"pytorch": _pytorch, "bundle": _bundle, "engine": _engine}[model["kind"]]
    return opened(model)


def _pytorch(model: Mapping[str, Any]) -> Opened:
    """On a GPU where torch sees one, else on the CPU, in 16 bits with the rounding of a GPU."""
    import contextlib

    import torch

    from moe3d_deploy.benchmarks.torch_device import set_exact_float32
    from moe3d_deploy.export.half import SixteenBitRun
    from moe3d_deploy.export.precision import PrecisionPolicy
    from moe3d_deploy.export.source import SourceSpec
    from moe3d_deploy.export.verify import deployed_model

    set_exact_float32()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    in_float64 = model["precision"] == "fp64"
    policy = PrecisionPolicy("fp32" if in_float64 else model["precision"])
    rounds = policy.sixteen_bit and device == "cpu"
    if rounds:  # explicit attention, whose products are rounded one by one
        request = {"source": model["source"], "policy": {"precision": policy.precision}, "outputs": model["outputs"]}
        network = deployed_model({**request, "merge": True})
    else:
        network = SourceSpec(**model["source"]).load(policy, model["outputs"]).to(device)
    if in_float64:
        network = network.double()

    def run(pixels: NDArray[np.uint8]) -> Arrays:
        images = torch.from_numpy(to_floats(pixels)).to(device, torch.float64 if in_float64 else torch.float32)
        with SixteenBitRun(network) if rounds else contextlib.nullcontext(), torch.no_grad():
            result = network(images, outputs=model["outputs"])
        return {name: (value if in_float64 else value.float()).cpu().numpy() for name, value in result.items()}

    return Opened(device, run)


def _bundle(model: Mapping[str, Any]) -> Opened:
    """Whole or split; its digests are checked first."""
    from moe3d_deploy.runtime.session import Session

    return Opened("cpu", Session.open(model["path"], backend="onnxruntime").run)


def _engine(model: Mapping[str, Any]) -> Opened:
    """An engine of a whole model on the first GPU; never run so far."""
    from moe3d_deploy.bundle import Bundle
    from moe3d_deploy.trt import EngineRunner

    bundle = Bundle.open(model["path"], verify="sizes", engines=False)
    record = next(record for record in bundle.manifest.engines if record.file == model["file"])
    takes_pixels = bundle.manifest.inputs[0].dtype == "uint8"
    runner = EngineRunner.of_bundle(bundle, record)

    def run(pixels: NDArray[np.uint8]) -> Arrays:
        return runner.run({"images": pixels if takes_pixels else to_floats(pixels)})

    return Opened("cuda", run)
