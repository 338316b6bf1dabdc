"""Small ONNX models, and engines of them by TensorRT-RTX, which builds without a GPU.

A test file takes these fixtures by `pytest_plugins = ["engine_fixtures"]`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import PROFILE, Build, Write

from moe3d_deploy import trt
from moe3d_deploy.engines import build as engine_build
from moe3d_deploy.engines.shapes import ShapeProfile


@pytest.fixture(scope="session")
def write_model(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """write(name, dtype="fp16", layers=2, attention=False, sizes=..., tail=None, functions=()) -> path of an ONNX file.

    images (B, S, 3, H, W) -> tokens of 64 channels -> `layers` of MatMul, Relu and maybe attention -> depth, float32.
    """
    pytest.importorskip("tensorrt_rtx", reason="builds engines: pip install 'moe3d-deploy[rtx]'")
    onnx = pytest.importorskip("onnx", reason="writes ONNX models: pip install 'moe3d-deploy[export]'")
    folder = tmp_path_factory.mktemp("models")

    def write(
        name: str,
        dtype: str = "fp16",
        layers: int = 2,
        attention: bool = False,
        sizes: tuple[int | str, ...] = ("B", "S", 3, "H", "W"),
        tail: tuple[str, str] | None = None,
        functions: tuple[Any, ...] = (),
    ) -> Path:
        half = onnx.TensorProto.FLOAT16 if dtype == "fp16" else onnx.TensorProto.FLOAT
        rng = np.random.default_rng(0)
        nodes: list[Any] = []
        weights: list[Any] = []

        def constant(value: np.ndarray) -> str:
            weights.append(onnx.numpy_helper.from_array(value, f"w{len(weights)}"))
            return str(weights[-1].name)

        def node(op: str, *inputs: str, **attributes: Any) -> str:
            output = f"t{len(nodes)}"
            nodes.append(onnx.helper.make_node(op, inputs, [output], name=f"{op}_{len(nodes)}", **attributes))
            return output

        def linear(x: str) -> str:
            weight = rng.standard_normal((64, 64)) / 8
            return node("MatMul", x, constant(weight.astype(np.float16 if dtype == "fp16" else np.float32)))

        def heads(x: str, perm: tuple[int, ...] = (0, 2, 1, 3)) -> str:
            return node("Transpose", node("Reshape", x, constant(np.array([0, -1, 2, 32]))), perm=perm)

        x = node("Cast", node("Reshape", "images", constant(np.array([0, -1, 64]))), to=half)
        for _ in range(layers):
            if attention:
                q, k, v = heads(linear(x)), heads(linear(x), (0, 2, 3, 1)), heads(linear(x))
                mixed = node("MatMul", node("Softmax", node("MatMul", q, k), axis=-1), v)
                x = node("Reshape", node("Transpose", mixed, perm=[0, 2, 1, 3]), constant(np.array([0, -1, 64])))
            x = node("Relu", linear(x))
        x = node("Cast", x, to=onnx.TensorProto.FLOAT)
        if tail:
            x = node(tail[0], x, domain=tail[1])
        nodes[-1].output[0] = "depth"
        graph = onnx.helper.make_graph(
            nodes,
            "test",
            [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, sizes)],
            [onnx.helper.make_tensor_value_info("depth", onnx.TensorProto.FLOAT, None)],
            weights,
        )
        opsets = [onnx.helper.make_opsetid("", 20)] + ([onnx.helper.make_opsetid(tail[1], 1)] if tail else [])
        model = onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=9)
        onnx.save(model, folder / name)
        return folder / name

    return write


@pytest.fixture(scope="session")
def built(write_model: Write, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Records of an fp16 and an fp32 attention engine, with the plan's path and the progress events added."""
    folder = tmp_path_factory.mktemp("built")

    def build(dtype: str) -> dict[str, Any]:
        model, plan = write_model(f"attention_{dtype}.onnx", dtype, attention=True), folder / f"{dtype}.plan"
        events: list[tuple[str, int, int]] = []
        record = engine_build.build(
            model, plan, PROFILE, precision=dtype, builder="tensorrt-rtx", progress=lambda *event: events.append(event)
        )
        return {"record": record, "plan": plan, "events": events}

    return {dtype: build(dtype) for dtype in ("fp16", "fp32")}


@pytest.fixture
def build_here(tmp_path: Path) -> Build:
    """build_here(onnx_path, out=tmp_path / "plan", profile=PROFILE, **options): build in this process."""

    def build(
        path: Path, out: Path = tmp_path / "plan", profile: ShapeProfile = PROFILE, **options: Any
    ) -> trt.BuiltEngine:
        return trt.build_engine(path, out, profile, builder="tensorrt-rtx", **options)

    return build
