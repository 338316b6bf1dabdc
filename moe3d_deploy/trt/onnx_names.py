"""Names of ONNX nodes in the metadata that the parser gives to layers, and the builder to what it makes of them."""

import re


def onnx_nodes(metadata: str) -> list[str]:
    """The nodes of `[ONNX Layer: a][ONNX Layer: b | call (Function)]`, in order: of a function's body also its call."""
    return re.findall(r"\[ONNX Layer: ([^\]]+)\]", metadata)


def calls_of(metadata: str) -> list[tuple[str, str]]:
    """(call, function) of each node that a model-local function has brought."""
    return re.findall(r" \| ([^|\]]+) \((\w+)\)", metadata)
