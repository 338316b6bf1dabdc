"""The attention node: what the file holds, what ONNX Runtime makes of it, and that all forms compute the same."""

from collections import Counter
from pathlib import Path

import exports
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from moe3d_deploy.export import attention, graph
from moe3d_deploy.export.twin import float32_twin
from moe3d_deploy.model.transformer import Attention, fused_attention
from moe3d_deploy.runtime.onnx_backend import OnnxBackend
from moe3d_deploy.runtime.onnx_operators import DOMAIN, NAME, for_onnxruntime

KERNEL = "MultiHeadAttention"


class OneAttention(nn.Module):
    """Two heads of `width` channels over images (B, T, 2 width)."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = Attention(2 * width, 2, qk_norm=True)
        self.attention.qkv.weight.data *= 3  # a flat softmax would hide a wrong scale
        self.to(dtype)

    def forward(self, images: Tensor) -> Tensor:
        return self.attention(images, None).float()


def write(module: OneAttention, folder: Path) -> Path:
    """The module with its attention as a node, batch and length free."""
    module.attention.attend = attention.operator_attention
    width = module.attention.proj.in_features
    axes = {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
    with torch.no_grad():
        program = torch.export.export(module, (torch.zeros(2, 9, width),), dynamic_shapes=(axes,), strict=False)
        with graph._quiet():
            exported = torch.onnx.export(program, dynamo=True, opset_version=20, input_names=["images"], verbose=False)
    assert exported is not None
    function = ir.serde.deserialize_function(attention.attention_function(20))
    exported.model.functions[function.identifier()] = function
    path = folder / "attention.onnx"
    ir.save(exported.model, path)
    onnx.checker.check_model(path, full_check=True)
    return path


def operators(model: bytes, folder: Path) -> Counter[str]:
    """What ONNX Runtime is left with once it has loaded and rewritten the file."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "loaded.onnx")
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "loaded.onnx").graph.node)


@pytest.mark.parametrize("width", [32, 64])  # 32^(-1/2) is no power of two
def test_the_node_and_its_function_compute_torchs_attention(width: int, tmp_path: Path) -> None:
    module = OneAttention(width, torch.float32).eval()
    images = torch.randn(3, 41, 2 * width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        module.attention.attend = fused_attention
        expected = module(images).numpy()
    data = write(module, tmp_path).read_bytes()

    for model in (data, for_onnxruntime(data)):
        session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"images": images.numpy()})
        assert np.abs(found - expected).max() < 5e-6 * np.abs(expected).max()


def test_onnx_runtime_runs_its_own_kernel_and_no_map_of_logits_is_left(tmp_path: Path) -> None:
    data = write(OneAttention(32, torch.float32).eval(), tmp_path).read_bytes()

    portable, its_own = operators(data, tmp_path), operators(for_onnxruntime(data), tmp_path)

    assert (portable[KERNEL], portable["Softmax"]) == (0, 1)
    assert (its_own[KERNEL], its_own["Softmax"]) == (1, 0)


def test_a_16_bit_file_gets_the_kernel_too_between_casts(tmp_path: Path) -> None:
    """ONNX Runtime computes 16-bit graphs in float32 on a CPU."""
    data = write(OneAttention(32, torch.float16).eval(), tmp_path).read_bytes()
    found = operators(for_onnxruntime(data), tmp_path)
    assert (found[KERNEL], found["Softmax"]) == (1, 0)


@pytest.mark.parametrize("width", [32, 64])
def test_no_factor_of_a_16_bit_file_is_rounded_to_16_bits(width: int, tmp_path: Path) -> None:
    """64^(-1/4) in bfloat16 is off by 1e-4 and 32^(-1/4) by 1e-3, and every logit twice that: float32 noise is 1e-6."""
    module = OneAttention(width, torch.bfloat16).eval()
    images = torch.randn(2, 9, 2 * width, generator=torch.Generator().manual_seed(1))
    path = write(module, tmp_path)

    session = ort.InferenceSession(float32_twin(path, tmp_path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})

    with torch.no_grad():
        module.float().attention.attend = fused_attention
        expected = module(images).numpy()
    assert np.abs(found - expected).max() < 5e-6 * np.abs(expected).max()


def test_an_exported_file_has_the_function_once_and_a_node_of_every_attention() -> None:
    exported = exports.merged()
    count = sum(isinstance(module, Attention) for module in exported.model.modules())
    iterations = exported.model.config.camera_head.num_iterations
    trunk = exported.model.config.camera_head.trunk_depth

    nodes = [node for node in exported.proto.graph.node if node.op_type == NAME]

    assert len(nodes) == count + (iterations - 1) * trunk
    assert {node.domain for node in nodes} == {DOMAIN}
    assert [function.name for function in exported.proto.functions if function.domain == DOMAIN] == [NAME]


def test_the_names_of_the_function_are_used_nowhere_else_in_the_file() -> None:
    """TensorRT-RTX's parser mixes up equal names of inner and outer scopes."""
    exported = exports.merged()
    inner = {
        name
        for function in exported.proto.functions
        if function.domain == DOMAIN
        for node in function.node
        for name in (*node.input, *node.output)
    }
    outer = {name for node in exported.proto.graph.node for name in (*node.input, *node.output)}
    assert inner
    assert not inner & outer


def test_the_backend_loads_the_file_with_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bytes] = []
    load = ort.InferenceSession

    def spy(model: bytes, *args: object, **options: object) -> ort.InferenceSession:
        given.append(model)
        return load(model, *args, **options)

    monkeypatch.setattr(ort, "InferenceSession", spy)
    backend = OnnxBackend(exports.merged().path, threads=1)

    nodes = onnx.load_from_string(given[0]).graph.node
    assert Counter(node.op_type for node in nodes)[KERNEL] > 0
    images = np.random.default_rng(0).random((2, 3, 3, 28, 42), np.float32)
    expected = exports.merged().run(images)["depth"]
    np.testing.assert_allclose(backend.run(images)["depth"], expected, rtol=1e-4)


def test_the_exchange_of_names_leaves_other_files_as_they_are(tmp_path: Path) -> None:
    data = exports.unmerged().path.read_bytes()
    assert len(for_onnxruntime(data)) == len(data)
    assert for_onnxruntime(b"no such name in here") == b"no such name in here"
    assert for_onnxruntime(for_onnxruntime(data)) == for_onnxruntime(data)


def test_no_weight_is_transposed_when_a_file_is_loaded() -> None:
    """The exporter leaves those that several nodes read, as the camera head's iterations do."""
    proto = exports.merged().proto
    weights = {tensor.name for tensor in proto.graph.initializer}
    assert not [node.name for node in proto.graph.node if node.op_type == "Transpose" and node.input[0] in weights]
