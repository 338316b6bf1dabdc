"""How many nodes an ONNX file has: what decides how long a runtime takes to load it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe3d_deploy.runtime.onnx_operators import DOMAIN
from moe3d_deploy.runtime.packages import load_package


def count_nodes(path: Path) -> int:
    """Nodes of the graph and of the graphs inside it as ONNX Runtime gets them, constants among them; weights are not
    read.

    A call of the file's own function counts as the function's nodes, but for an attention, which is one: ONNX Runtime
    has a kernel for it. Raises MissingExtraError without the package `onnx`.
    """
    model = load_package("onnx").load(str(path), load_external_data=False)
    functions = {(item.domain, item.name): item.node for item in model.functions if item.domain != DOMAIN}
    return _count(model.graph.node, functions)


def _count(nodes: Iterable[Any], functions: Mapping[tuple[str, str], Iterable[Any]]) -> int:
    total = 0
    for node in nodes:
        body = functions.get((node.domain, node.op_type))
        total += 1 if body is None else _count(body, functions)
        for attribute in node.attribute:
            for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                total += _count(graph.node, functions)
    return total
