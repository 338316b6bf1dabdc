"""The engine inspector's JSON as facts: which attentions are fused, what the expert mix became, layer types.

Nothing is loaded here. What the text does not say is "not told", never fused: an engine that was built without detailed
verbosity has its layers' names alone, and a name is no proof.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe3d_deploy.trt import Attention, calls_of, onnx_nodes

NOT_TOLD = "not told"

# Kernels that are a whole attention by their name: `_gemm_mha_v2_myl1_16`, `fmha_v2_flash_attention_...`.
_WHOLE = re.compile(r"(?:^|[^a-z])f?mha(?:[^a-z]|$)|flash_?attention", re.IGNORECASE)
_PRODUCT = re.compile(r"gemm|matrix|matmul", re.IGNORECASE)  # layer types
_PLUGIN = re.compile(r"^plugin", re.IGNORECASE)
# Of `Half`, `Row major linear FP16 format`, `Channel major FP16 format where channel % 4 == 0`; the first that matches.
_TYPES = (
    ("bf16", re.compile(r"\b(?:BF16|BFloat16)\b", re.IGNORECASE)),
    ("fp16", re.compile(r"\b(?:FP16|Half)\b", re.IGNORECASE)),
    ("fp32", re.compile(r"\b(?:FP32|Float)\b", re.IGNORECASE)),
    ("int64", re.compile(r"\bInt64\b", re.IGNORECASE)),
    ("int32", re.compile(r"\bInt32\b", re.IGNORECASE)),
    ("bool", re.compile(r"\bBool\b", re.IGNORECASE)),
    ("int8", re.compile(r"\bU?Int8\b", re.IGNORECASE)),
)


@dataclass(frozen=True)
class Layer:
    """A layer of the engine: `kind` is its LayerType, `dtype` that of its first input, `nodes` the ONNX nodes in it."""

    name: str
    kind: str
    tactic: str
    dtype: str
    metadata: str
    nodes: frozenset[str]

    @property
    def is_whole_attention(self) -> bool:
        return bool(_WHOLE.search(self.name) or _WHOLE.search(self.tactic))


def inspected(text: str, attentions: Sequence[Attention], *, profiles: int = 1) -> dict[str, Any]:
    """JSON-able facts from `IEngineInspector.get_engine_information(LayerInformationFormat.JSON)`.

    attentions   of the network that the engine was built from
    profiles     of the engine; an attention is fused where every profile has a kernel for it

    told             whether there are details; `reason` says why not, and then nothing else is there
    layers           layer type -> type of the first input -> count
    attentions       type of an attention -> "fused", "apart" (its softmax is in a kernel that is not all of it) or
                     "not told" -> count
    fused_layers     names of the kernels that hold one
    expert_mix       "plugin" and "function" -> how many layers are it, or have nodes of its body
    plugins          names of the plugin layers
    """
    found = _layers(text)
    if isinstance(found, str):
        return not_told(found)
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for layer in found:
        kinds[layer.kind][layer.dtype] += 1
    naming: dict[str, list[Layer]] = defaultdict(list)
    for layer in found:
        for node in layer.nodes:
            naming[node].append(layer)
    states: dict[str, Counter[str]] = defaultdict(Counter)
    fused: dict[str, None] = {}
    for attention in attentions:
        state, kernels = _state(attention, naming, profiles)
        states[attention.dtype][state] += 1
        fused.update(dict.fromkeys(layer.name for layer in kernels))
    plugins = [layer for layer in found if _PLUGIN.match(layer.kind)]
    mixes = [layer for layer in plugins if "ExpertMix" in layer.name or "ExpertMix" in layer.metadata]
    bodies = [layer for layer in found if any(name == "ExpertMix" for _, name in calls_of(layer.metadata))]
    return {
        "told": True,
        "reason": None,
        "layers": {kind: dict(counts) for kind, counts in kinds.items()},
        "attentions": {dtype: dict(counts) for dtype, counts in states.items()},
        "fused_layers": list(fused),
        "expert_mix": {"plugin": len(mixes), "function": len([layer for layer in bodies if layer not in mixes])},
        "plugins": [layer.name for layer in plugins],
    }


def not_told(reason: str) -> dict[str, Any]:
    """The facts where there are none."""
    return {"told": False, "reason": reason}


def _state(attention: Attention, naming: Mapping[str, Sequence[Layer]], profiles: int) -> tuple[str, Sequence[Layer]]:
    """fused, apart or NOT_TOLD, and the kernels that hold all of it.

    A kernel that names the softmax and both products is all of the attention by its name, or where no other layer
    names a product: a softmax's kernel may name the products whose operands it prepares. A kernel of another name that
    names an attention operator shows nothing either way, unless it is a product of its own.
    """
    naming_core = naming.get(attention.core, ())
    whole = [layer for layer in naming_core if layer.is_whole_attention]
    others = [layer for layer in naming_core if not layer.is_whole_attention]
    covering = [layer for layer in others if attention.products and layer.nodes.issuperset(attention.products)]
    if not whole and covering:
        named = [layer for product in attention.products for layer in naming.get(product, ())]
        if all(layer in covering for layer in named):
            whole, others, covering = covering, [layer for layer in others if layer not in covering], []
    if len(whole) >= profiles:
        return "fused", whole
    if attention.products:
        apart = [layer for layer in others if layer not in covering]
    else:
        apart = [layer for layer in others if _PRODUCT.search(layer.kind)]
    return ("apart", whole) if apart else (NOT_TOLD, whole)


def _layers(text: str) -> list[Layer] | str:
    """The layers with their details, or why there are none."""
    try:
        content = json.loads(text)
    except ValueError:
        return "its text is no JSON"
    entries = content.get("Layers") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        return "it lists no layers"
    if all(isinstance(entry, str) for entry in entries):
        return "it has the layers' names alone: the engine was built without detailed verbosity"
    layers = []
    for entry in entries:
        if isinstance(entry, str):
            entry = {"Name": entry, "LayerType": NOT_TOLD}
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("Name", "LayerType")):
            return "a layer of it has no name or type"
        layers.append(_layer(entry))
    return layers


def _layer(entry: Mapping[str, Any]) -> Layer:
    metadata, tactic = (entry.get(key) for key in ("Metadata", "TacticName"))
    metadata = metadata if isinstance(metadata, str) else ""
    return Layer(
        name=entry["Name"],
        kind=entry["LayerType"],
        tactic=tactic if isinstance(tactic, str) else "",
        dtype=_dtype(entry.get("Inputs")),
        metadata=metadata,
        nodes=frozenset(onnx_nodes(metadata)),
    )


def _dtype(inputs: Any) -> str:
    """Of the first input: `Datatype` in TensorRT 11, `Format/Datatype` in 10, where it is N/A if a shape decides it."""
    first = inputs[0] if isinstance(inputs, list) and inputs and isinstance(inputs[0], dict) else {}
    text = first.get("Datatype", first.get("Format/Datatype"))
    if not isinstance(text, str):
        return NOT_TOLD
    return next((name for name, pattern in _TYPES if pattern.search(text)), NOT_TOLD)
