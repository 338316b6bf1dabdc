"""An engine inspector's JSON for tests, in the form of TensorRT 10 and of 11, and made of layers that were listed."""

import json
import re
from typing import Any

from moe3d_deploy.trt import Attention

FIRST = Attention("node_softmax", ("node_matmul_2", "node_matmul_3"), "fp16")
SECOND = Attention("node_softmax_1", ("node_matmul_4", "node_matmul_5"), "fp16")
CAMERA = Attention("node_softmax_12", ("node_matmul_26", "node_matmul_27"), "fp32")


def layer(name: str, kind: str, *nodes: str, dtype: str = "Half", old: bool = True, **more: Any) -> dict[str, Any]:
    """A layer with its details; `old` is TensorRT 10's form of a tensor's type, else 11's."""
    tensor: dict[str, Any] = {"Name": "x", "Location": "Device", "Dimensions": [-1, -1, 64]}
    tensor |= {"Format/Datatype": dtype} if old else {"Datatype": dtype, "Format": "(Linear) Row major linear format"}
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    tactic = {"TacticName": f"{re.sub('_myl.*', '', name)}_0x83a1", "StreamId": 0}
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [tensor],
        "Outputs": [tensor],
        **tactic,
        "Metadata": metadata,
    } | more


def fused(attention: Attention, number: int = 1, **more: Any) -> dict[str, Any]:
    nodes = (attention.products[1], "node__to_copy", attention.core, attention.products[0])
    return layer(f"_gemm_mha_v2_myl{number}_16", "kgen", *nodes, **more)


def apart(attention: Attention, number: int = 1, dtype: str = "Half") -> list[dict[str, Any]]:
    """Products of their own, and a softmax that names the first of them: as TensorRT-RTX 1.7.1 lists them."""
    first, second = attention.products
    return [
        layer(f"{first}_myl{number}_12", "gemm", first, dtype=dtype),
        layer(f"__myl_MaxrSubExpSumDivMul_myl{number}_13", "kgen", attention.core, first, dtype=dtype),
        layer(f"{second}_myl{number}_14", "gemm", second, dtype=dtype),
    ]


def text_of(*layers: Any) -> str:
    return json.dumps({"Layers": list(layers), "Bindings": ["images", "depth"]})


def of_listing(listing: str) -> str:
    """The layers that TensorRT-RTX lists while it builds, in the inspector's form."""
    rows = []
    for line in listing.splitlines():
        if match := re.search(r"Name: (.+?), LayerType: (\w+), Inputs: \[(.*?)\], Constants: ", line):
            datatype = re.search(r"Datatype: (\w+)", match[3])
            tactic = re.search(r"TacticName: (\w+)", line)
            rows.append(
                {
                    "Name": match[1],
                    "LayerType": match[2],
                    "Inputs": [{"Name": "x", "Datatype": datatype[1]}] if datatype else [],
                    "TacticName": tactic[1] if tactic else "",
                    "Metadata": line.rpartition("Metadata: ")[2],
                }
            )
    return text_of(*rows)
