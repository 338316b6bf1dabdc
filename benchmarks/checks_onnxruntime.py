"""GPU check of ONNX Runtime's CUDA provider: does it run the file, all of its arithmetic on the card, and rightly?"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe3d_deploy.benchmarks.bundle_reference import Reference, compare, find_bundle, text
from moe3d_deploy.benchmarks.checks import CheckRun
from moe3d_deploy.export.verify import SHAPES_IN_PATCHES, Shape
from moe3d_deploy.runtime.onnx_operators import FOLDER_OF_WEIGHTS, for_onnxruntime

CUDA = "CUDAExecutionProvider"
LARGE: Shape = (1, 2, 28, 37)  # 518x392

# Nodes that belong on the card. Arithmetic on shapes stays on the CPU by design, and is none of these.
COMPUTE_OPS = frozenset({
    "Attention", "BiasGelu", "BiasSoftmax", "Conv", "ConvTranspose", "Einsum", "FastGelu", "FusedConv", "FusedGemm",
    "FusedMatMul", "Gelu", "Gemm", "LayerNormalization", "MatMul", "MultiHeadAttention", "NhwcConv", "Resize",
    "SkipLayerNormalization", "Softmax",
})  # fmt: skip

Placement = dict[str, dict[str, int]]


def onnxruntime_cuda(run: CheckRun) -> None:
    """The bundle's ONNX file on the card at the export's verification shapes; fails if arithmetic runs elsewhere."""
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        run.skip(
            f"onnxruntime {onnxruntime.__version__} is a build without CUDA; "
            "in another environment: pip install 'moe3d-deploy[gpu]'"
        )
    bundle = find_bundle(run)
    reference = Reference(run, bundle.manifest)
    if hasattr(onnxruntime, "preload_dlls"):  # finds CUDA's and cuDNN's libraries in their wheels
        onnxruntime.preload_dlls()
    run.step("loading the file")
    session = profiled_session(bundle.model_path, run.work, [(CUDA, {"use_tf32": "0"}), "CPUExecutionProvider"])
    run.record(onnxruntime=onnxruntime.__version__, providers=session.get_providers(), shapes=[])
    if CUDA not in session.get_providers():
        run.fail("ONNX Runtime's CUDA provider did not load; see that CUDA and cuDNN of its version are installed")
        return
    names = [output.name for output in session.get_outputs()]
    shapes: list[dict[str, Any]] = []
    for shape in (*SHAPES_IN_PATCHES, LARGE):
        label = f"{text(shape)} patches"
        run.step(f"running {label}")
        found = dict(zip(names, session.run(None, {"images": reference.images(shape)}), strict=True))
        measured = compare(run, label, found, reference.outputs(shape), reference.precision)
        shapes.append({"shape_in_patches": list(shape), "errors": measured})
        run.record(shapes=shapes)
    placed = placement(json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")))
    run.record(placement=placed)
    if strays := misplaced(placed, CUDA):
        run.fail(f"not on the card: {', '.join(f'{count} {op}' for op, count in strays.items())}")


def profiled_session(model: Path, folder: Path, providers: list[Any]) -> Any:
    """A session that writes a profile, with the provider of every node, into `folder`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "onnxruntime")
    options.add_session_config_entry(FOLDER_OF_WEIGHTS, str(model.parent))
    return onnxruntime.InferenceSession(for_onnxruntime(model.read_bytes()), options, providers=providers)


def placement(events: Iterable[dict[str, Any]]) -> Placement:
    """provider -> operator -> number of nodes, from the events of ONNX Runtime's profile; a node counts once."""
    nodes: dict[str, tuple[str, str]] = {}
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") == "Node" and "provider" in arguments:
            nodes[event["name"]] = (arguments["provider"], arguments["op_name"])
    placed: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for provider, operator in nodes.values():
        placed[provider][operator] += 1
    return {provider: dict(sorted(operators.items())) for provider, operators in placed.items()}


def misplaced(placed: Placement, provider: str) -> dict[str, int]:
    """Operators of COMPUTE_OPS on other providers than this, with their number."""
    strays: dict[str, int] = defaultdict(int)
    for other, operators in placed.items():
        for operator, count in operators.items():
            if other != provider and operator in COMPUTE_OPS:
                strays[operator] += count
    return dict(strays)
