"""Operators of an exported file that ONNX Runtime has kernels for under names of its own.

An exported attention is a node `moe3d.kernels::Moe3dSelfAttention`, with its formula beside it as a model-local
function (`moe3d_deploy.export.attention`). ONNX Runtime has one kernel for the whole, which works block by block and
never holds a map of T x T logits: `com.microsoft::MultiHeadAttention`. The file does not use that name: TensorRT-RTX
knows it too, takes it for its own fused attention and then has no float32 kernel for it.

So it is with the sums of a product in 8 bits (`export.eight_bit`): `com.microsoft::MatMulIntegerToFloat` scales them
while they are at hand, where the operations of the formula would write them three times.

The names of a pair are equally long. So one file becomes the other by an exchange of bytes, as protobuf writes the
length of a text before it, and neither a robot's Python nor C++ needs a protobuf library.
"""

DOMAIN, NAME = "moe3d.kernels", "Moe3dSelfAttention"
MATMUL_NAME = "Moe3dMatMulInt8Float"  # integers from a product of 8 bits, times two scales: `export.eight_bit`
FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's option for a model given as bytes: where the file of its weights is."""

_OF_ONNXRUNTIME = {DOMAIN: "com.microsoft", NAME: "MultiHeadAttention", MATMUL_NAME: "MatMulIntegerToFloat"}


def has_eight_bits(model: bytes) -> bool:
    """Whether an ONNX file, with its own names, has matrix products in 8 bits."""
    return MATMUL_NAME.encode() in model


def for_onnxruntime(model: bytes) -> bytes:
    """The ONNX file with ONNX Runtime's names; unchanged where it has none of the operators."""
    for portable, its_own in _OF_ONNXRUNTIME.items():
        model = model.replace(portable.encode(), its_own.encode())
    return model
