"""Does a built engine hold what its bundle promises? Types, the expert mix and fused attention, failing closed.

Nothing is executed: the network that the builder parsed and the layers it compiled are compared with what the model's
sizes and the precision policy give. A builder makes a float32 engine of a float32 graph without a word.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from moe3d_deploy.engines.plugin_rules import parser_takes
from moe3d_deploy.errors import EngineError
from moe3d_deploy.manifest import Manifest
from moe3d_deploy.trt import NetworkFacts, title

# Types of the trunk's matrix products and attention, of the patch convolution, and of the dense heads' convolutions.
_TYPES = {
    "fp32": ("fp32", "fp32", "fp32"),
    "fp16": ("fp16", "fp16", "fp16"),
    "fp16-fp32heads": ("fp16", "fp16", "fp32"),
    "bf16": ("bf16", "fp32", "fp32"),
    "bf16-fp16heads": ("bf16", "fp32", "fp16"),
}

_LINEAR_OF_A_BLOCK = 4  # qkv, proj, fc1, fc2; attention's own two come with them unless it is one operator
ATTENTION_OPSET = 23  # the first with attention as an operator
# Of a dense head up to its full-resolution features: 4 projections, 3 resizings (2 of them transposed), 4 to the common
# width, 3 fusions of 5 and the coarsest of 3, 1 output.
_CONVOLUTIONS_OF_A_HEAD = 4 + 3 + 4 + 3 * 5 + 3 + 1


@dataclass(frozen=True)
class Expected:
    """What the sizes of a model and its precision give.

    blocks         transformer blocks of encoder and aggregator, each with one attention
    trunk          type of their matrix products and attention: fp32, fp16 or bf16
    products       matrix products in that type; the others (camera head, position embedding, expert mix) are fp32
    attentions     type -> count of attention operators; empty where attention is plain products
    convolutions   type -> count, transposed ones included
    expert_mix     nodes of moe3d::ExpertMix
    """

    blocks: int
    trunk: str
    products: int
    attentions: dict[str, int]
    convolutions: dict[str, int]
    expert_mix: int


def expected(manifest: Manifest) -> Expected:
    """What an engine of this bundle has to hold. Raises EngineError for a precision without a known policy."""
    config, precision = manifest.config, manifest.precision
    if precision not in _TYPES:
        known = ", ".join(_TYPES)
        raise EngineError(f"{manifest.name}: no audit knows precision {precision!r}; export with one of {known}")
    blocks = config.vit.depth + 2 * config.aggregator.depth  # the aggregator's come in pairs
    wide, last = _branches(manifest)
    dense = (1 + _has_point_head(manifest)) * _CONVOLUTIONS_OF_A_HEAD + wide
    trunk, patch, heads = _TYPES[precision]
    as_operator = manifest.opset >= ATTENTION_OPSET
    convolutions: Counter[str] = Counter()
    for dtype, count in ((patch, 1), (heads, dense), ("fp32", last)):
        convolutions[dtype] += count
    return Expected(
        blocks=blocks,
        trunk=trunk,
        products=blocks * (_LINEAR_OF_A_BLOCK + (0 if as_operator else 2)),
        attentions={trunk: blocks} if as_operator else {},
        convolutions={dtype: count for dtype, count in convolutions.items() if count},
        expert_mix=int(manifest.merged_experts),
    )


def _branches(manifest: Manifest) -> tuple[int, int]:
    """Convolutions behind the features of all dense heads: 3x3, and the last 1x1, whose output is exponentiated."""
    moe = manifest.config.moe
    branches = moe.num_experts + 1 if moe else 1
    wide, last = (1, 0) if manifest.merged_experts else (branches, branches)
    points = _has_point_head(manifest)
    return wide + points, last + points


def _has_point_head(manifest: Manifest) -> bool:
    return any(tensor.name in ("point_map", "point_map_conf") for tensor in manifest.outputs)


def audit(
    facts: dict[str, Any], manifest: Manifest, *, built_by: tuple[str, str] | None = None, plugin: bool = False
) -> dict[str, Any]:
    """Compare what `engines.build` found in an engine, the `audit` of its record, with what `manifest` asks for.

    built_by   builder and its version: whether function or plugin ran has to be what its parser takes
    plugin     whether a plugin for the expert mix was registered for the build

    Returns a JSON-able dict: `summary` (one line for people), `faults` (empty for a good engine), `notes`, and the
    figures; `expert_mix` says what ran: function, plugin, or plain where there is none of both. Raises EngineError for
    facts that are not complete.
    """
    want = expected(manifest)
    try:
        network = NetworkFacts(**facts["network"])
        fused = facts["compiled"] and facts["compiled"]["fused_attention"]
        figures = {key: facts[key] for key in ("tf32", "activation_memory_bytes", "executed")}
    except (KeyError, TypeError) as error:
        raise EngineError(
            f"the builder's report on the engine of {manifest.name} is not complete ({error}), so it "
            "cannot be audited; build it again with one version of moe3d-deploy"
        ) from error
    unfused = fused == 0
    parts = (
        f"{want.trunk} matmuls {_share(network.matmul, want.trunk)}",
        _convolutions(network.convolution, want),
        _mix(network),
        "attention fusion not told" if fused is None else f"attention fused {fused} of {want.blocks}",
        "executed" if figures["executed"] else "not executed",
    )
    return {
        "summary": ", ".join(parts),
        "faults": [
            *_type_faults(network, want, manifest.precision),
            *_mix_faults(network, want),
            *_precedence_faults(network, built_by, plugin),
            *_attention_faults(fused, want),
        ],
        "notes": ["attention is not fused: its memory grows with the square of the tokens"] if unfused else [],
        "strongly_typed": network.strongly_typed,
        "matmuls": network.matmul,
        "attention_operators": network.attention,
        "convolutions": network.convolution,
        "expert_mix": _mix_taken(network) or "plain",
        "attentions": want.blocks,
        "fused_attention": fused,
        **figures,
    }


def require_audit(
    facts: dict[str, Any], manifest: Manifest, *, built_by: tuple[str, str] | None = None, plugin: bool = False
) -> dict[str, Any]:
    """The `audit` of a good engine. Raises EngineError, in one line, for one that is not what its bundle promises."""
    result = audit(facts, manifest, built_by=built_by, plugin=plugin)
    if result["faults"]:
        raise EngineError(
            f"the engine of {manifest.name} is not the {manifest.precision} engine that its bundle promises: "
            f"{'; '.join(result['faults'])}"
        )
    return result


_EXPORT_AGAIN = "export the model again"


def _type_faults(network: NetworkFacts, want: Expected, precision: str) -> list[str]:
    faults = []
    if network.strongly_typed is not True:
        faults.append("its network is not strongly typed, so the builder chose the types: use TensorRT 10.3 or newer")
    products, sixteen_bit = network.matmul, want.trunk != "fp32"
    of_trunk = products.get(want.trunk, 0)
    fits = of_trunk == want.products if sixteen_bit else of_trunk >= want.products
    if not fits or set(products) - {want.trunk, "fp32"}:
        asked = f"{want.products} {want.trunk} matmuls and the others"
        if not sixteen_bit:
            asked = f"{want.products} or more matmuls"
        faults.append(f"{precision} asks for {asked} in fp32, the network has {_counts(products)}: {_EXPORT_AGAIN}")
    if network.attention != want.attentions:
        asked, found = _counts(want.attentions), _counts(network.attention)
        faults.append(f"{precision} asks for {asked} attention operators, the network has {found}: {_EXPORT_AGAIN}")
    if network.convolution != want.convolutions:
        asked, found = _counts(want.convolutions), _counts(network.convolution)
        faults.append(f"{precision} asks for {asked} convolutions, the network has {found}: {_EXPORT_AGAIN}")
    return faults


def _mix(network: NetworkFacts) -> str:
    taken = _mix_taken(network)
    return f"ExpertMix as {taken}" if taken else "no ExpertMix"


def _mix_taken(network: NetworkFacts) -> str:
    """What the parser made of the expert mix; empty where there is none."""
    if _mix_plugins(network):
        return "plugin"
    return "function" if network.functions.get("ExpertMix") else ""


def _mix_plugins(network: NetworkFacts) -> list[str]:
    return [name for name in network.plugins if "ExpertMix" in name]


def _mix_faults(network: NetworkFacts, want: Expected) -> list[str]:
    plugins = _mix_plugins(network)
    found = network.functions.get("ExpertMix", 0) + len(plugins)
    faults = []
    if found != want.expert_mix:
        experts = "merged experts" if want.expert_mix else "a model without merged experts"
        verb = "ask" if want.expert_mix else "asks"
        faults.append(f"{experts} {verb} for {want.expert_mix} ExpertMix, the network has {found}: {_EXPORT_AGAIN}")
    if others := [name for name in network.plugins if name not in plugins]:
        faults.append(f"layer {others[0]} is a plugin, which the model does not ask for: {_EXPORT_AGAIN}")
    return faults


def _precedence_faults(network: NetworkFacts, built_by: tuple[str, str] | None, plugin: bool) -> list[str]:
    """The exported node names its plugin's namespace, and the model has its function."""
    ran = _mix_taken(network)
    if built_by is None or not ran:
        return []
    builder, version = built_by
    takes = parser_takes(builder, version, registered=plugin)
    if takes == ran:
        return []
    library = "with" if plugin else "without"
    return [
        f"{title(builder)} {version} takes the {takes} of ExpertMix {library} a plugin library, the network has the "
        f"{ran}: build it again in a process that loads no other plugin"
    ]


def _attention_faults(fused: int | None, want: Expected) -> list[str]:
    """TensorRT-RTX never fuses float32 attention: a note, no fault."""
    if fused is None or want.trunk == "fp32" or fused == want.blocks:
        return []
    return [
        f"{want.blocks} attentions are to be fused, the compiled engine has {fused}, and the others' memory grows with "
        "the square of the tokens: build with another version (TensorRT-RTX 1.7.1 fuses all)"
    ]


def _convolutions(found: dict[str, int], want: Expected) -> str:
    """How many are in the trunk's type; where none is to be (bf16), in the type of most, which is then named."""
    if want.trunk in want.convolutions:
        return f"convolutions {_share(found, want.trunk)}"
    main = max(want.convolutions, key=lambda dtype: want.convolutions[dtype])
    return f"{main} convolutions {_share(found, main)}"


def _share(counts: dict[str, int], dtype: str) -> str:
    return f"{counts.get(dtype, 0)} of {sum(counts.values())}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {dtype}" for dtype, count in sorted(counts.items())) or "none"
