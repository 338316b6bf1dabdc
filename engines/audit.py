"""Does a built engine hold what its bundle promises? Types, the expert mix and fused attention, failing closed.

Nothing is executed: the network that the builder parsed and the layers it compiled are compared with what the model's
sizes and the precision policy give. A builder makes a float32 engine of a float32 graph without a word.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from moe3d_deploy.engines.attention_memory import attention_of_profiles
from moe3d_deploy.engines.fusion import fusion
from moe3d_deploy.engines.planned import has_point_head
from moe3d_deploy.engines.plugin_rules import must_remove_function, parser_takes
from moe3d_deploy.errors import EngineError, InputError
from moe3d_deploy.manifest import WITH_HEADS, Manifest, Profile
from moe3d_deploy.trt import NetworkFacts, title

FINDINGS = {
    "strong-typing": "the builder was free to choose types",
    "matmul-types": "matrix products of other types or number",
    "attention-types": "attention operators of other types or number",
    "convolution-types": "convolutions of other types or number",
    "expert-mix": "another number of expert mixes, or a plugin where the function was to be taken, or the other way",
    "other-plugin": "a plugin layer that is no expert mix",
    "attention": "attention that is not fused, by the engine's layers or by its activation memory, or these disagree",
}
"""The names by which a finding may be accepted, and what each is."""

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


class Finding(NamedTuple):
    """One difference, by its name in FINDINGS, in words."""

    name: str
    text: str


def check_names(names: Iterable[str]) -> None:
    """Raise InputError for a name that no finding has."""
    for name in names:
        if name not in FINDINGS:
            raise InputError(f"--accept {name}: the audit has no such finding; its findings are {', '.join(FINDINGS)}")


def expected(manifest: Manifest, part: str | None = None) -> Expected:
    """What an engine of this bundle, or of the part of a role, has to hold.

    Raises EngineError for a precision without a known policy.
    """
    config, precision = manifest.config, manifest.precision
    if precision not in _TYPES:
        known = ", ".join(_TYPES)
        raise EngineError(f"{manifest.name}: no audit knows precision {precision!r}; export with one of {known}")
    encodes, aggregates = part in (None, "encoder", "aggregator"), part in (None, "decoder", "aggregator")
    has_heads = part in WITH_HEADS
    blocks = config.vit.depth * encodes + 2 * config.aggregator.depth * aggregates  # the aggregator's come in pairs
    wide, last = _branches(manifest) if has_heads else (0, 0)
    dense = (1 + has_point_head(manifest)) * _CONVOLUTIONS_OF_A_HEAD * has_heads + wide
    trunk, patch, heads = _TYPES[precision]
    as_operator = manifest.opset >= ATTENTION_OPSET
    convolutions: Counter[str] = Counter()
    for dtype, count in ((patch, int(encodes)), (heads, dense), ("fp32", last)):
        convolutions[dtype] += count
    return Expected(
        blocks=blocks,
        trunk=trunk,
        products=blocks * (_LINEAR_OF_A_BLOCK + (0 if as_operator else 2)),
        attentions={trunk: blocks} if as_operator and blocks else {},
        convolutions={dtype: count for dtype, count in convolutions.items() if count},
        expert_mix=int(manifest.merged_experts and has_heads),
    )


def _branches(manifest: Manifest) -> tuple[int, int]:
    """Convolutions behind the features of all dense heads: 3x3, and the last 1x1, whose output is exponentiated."""
    moe = manifest.config.moe
    branches = moe.num_experts + 1 if moe else 1
    wide, last = (1, 0) if manifest.merged_experts else (branches, branches)
    points = has_point_head(manifest)
    return wide + points, last + points


def audit(
    facts: dict[str, Any],
    manifest: Manifest,
    *,
    built_by: tuple[str, str] | None = None,
    plugin: bool = False,
    profiles: Sequence[Profile] = (),
    accept: Collection[str] = (),
    part: str | None = None,
) -> dict[str, Any]:
    """Compare what `engines.build` found in an engine, the `audit` of its record, with what `manifest` asks for.

    built_by   builder and its version: whether function or plugin ran has to be what its parser takes
    plugin     whether a plugin for the expert mix was registered for the build
    profiles   of the engine; without them its activation memory tells nothing of the attention
    accept     names of FINDINGS that may stand
    part       role of the part that the engine is of; None: the whole model

    Returns a JSON-able dict: `summary` (one line for people), `findings` (all differences, each `name`, `text` and
    whether it is `accepted`), `notes`, and the figures; `expert_mix` says what ran: function, plugin, or plain where
    there is none of both. Raises EngineError for facts that are not complete, InputError for a name in `accept` that no
    finding has.
    """
    check_names(accept)
    want = expected(manifest, part)
    inspector = facts.get("inspector")  # None where there was no GPU to ask it on
    shown = inspector if inspector and inspector["told"] else None
    try:
        network = NetworkFacts(**facts["network"])
        listed = facts["compiled"] and facts["compiled"]["fused_attention"]
        figures = {key: facts[key] for key in ("tf32", "activation_memory_bytes", "executed")}
    except (KeyError, TypeError) as error:
        raise EngineError(
            f"the builder's report on the engine of {manifest.name} is not complete ({error}), so it "
            "cannot be audited; build it again with one version of moe3d-deploy"
        ) from error
    memory = attention_of_profiles(manifest, profiles, figures["activation_memory_bytes"], part) if profiles else []
    attention = fusion(want.blocks, want.trunk, inspector=shown, listed=listed, memory=memory)
    parts = (
        *([f"{want.trunk} matmuls {_share(network.matmul, want.trunk)}"] if want.blocks else []),
        _convolutions(network.convolution, want),
        _mix(network),
        attention.summary,
        "executed" if figures["executed"] else "not executed",
    )
    findings = [
        *_type_findings(network, want, manifest.precision),
        *_mix_findings(network, want),
        *_precedence_findings(network, built_by, plugin),
        *_inspected_mix_findings(network, shown),
        *(Finding("attention", text) for text in attention.faults),
    ]
    found = {finding.name for finding in findings}
    return {
        "summary": ", ".join(parts),
        "findings": [{**finding._asdict(), "accepted": finding.name in accept} for finding in findings],
        "notes": [
            *attention.notes,
            *([f"the engine's inspector tells nothing: {inspector['reason']}"] if inspector and not shown else []),
            *(f"--accept {name} was not needed" for name in dict.fromkeys(accept) if name not in found),
        ],
        "strongly_typed": network.strongly_typed,
        "matmuls": network.matmul,
        "attention_operators": network.attention,
        "convolutions": network.convolution,
        "expert_mix": _mix_taken(network) or "plain",
        "attentions": want.blocks,
        "fused_attention": attention.fused,
        "attention_source": attention.source,
        "attention_memory": memory,
        "inspector": inspector,
        **figures,
    }


def require_audit(
    facts: dict[str, Any],
    manifest: Manifest,
    *,
    built_by: tuple[str, str] | None = None,
    plugin: bool = False,
    profiles: Sequence[Profile] = (),
    accept: Collection[str] = (),
    part: str | None = None,
) -> dict[str, Any]:
    """The `audit` of a good engine. Raises EngineError, in one line, for one that is not what its bundle promises."""
    result = audit(facts, manifest, built_by=built_by, plugin=plugin, profiles=profiles, accept=accept, part=part)
    faults = [finding for finding in result["findings"] if not finding["accepted"]]
    if faults:
        flags = " ".join(f"--accept {name}" for name in dict.fromkeys(fault["name"] for fault in faults))
        raise EngineError(
            f"the engine of {manifest.name} is not the {manifest.precision} engine that its bundle promises: "
            f"{'; '.join(fault['text'] for fault in faults)}; or let it stand: {flags}"
        )
    return result


_EXPORT_AGAIN = "export the model again"


def _type_findings(network: NetworkFacts, want: Expected, precision: str) -> Iterator[Finding]:
    if network.strongly_typed is not True:
        text = "its network is not strongly typed, so the builder chose the types: use TensorRT 10.3 or newer"
        yield Finding("strong-typing", text)
    products, sixteen_bit = network.matmul, want.trunk != "fp32"
    of_trunk = products.get(want.trunk, 0)
    fits = of_trunk == want.products if sixteen_bit else of_trunk >= want.products
    if not fits or set(products) - {want.trunk, "fp32"}:
        asked = f"{want.products} {want.trunk} matmuls and the others"
        if not sixteen_bit:
            asked = f"{want.products} or more matmuls"
        text = f"{precision} asks for {asked} in fp32, the network has {_counts(products)}: {_EXPORT_AGAIN}"
        yield Finding("matmul-types", text)
    for name, what, asked_for, there in (
        ("attention-types", "attention operators", want.attentions, network.attention),
        ("convolution-types", "convolutions", want.convolutions, network.convolution),
    ):
        if there != asked_for:
            has = f"the network has {_counts(there)}: {_EXPORT_AGAIN}"
            yield Finding(name, f"{precision} asks for {_counts(asked_for)} {what}, {has}")


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


def _mix_findings(network: NetworkFacts, want: Expected) -> Iterator[Finding]:
    plugins = _mix_plugins(network)
    found = network.functions.get("ExpertMix", 0) + len(plugins)
    if found != want.expert_mix:
        experts = "merged experts" if want.expert_mix else "a model without merged experts"
        verb = "ask" if want.expert_mix else "asks"
        text = f"{experts} {verb} for {want.expert_mix} ExpertMix, the network has {found}: {_EXPORT_AGAIN}"
        yield Finding("expert-mix", text)
    if others := [name for name in network.plugins if name not in plugins]:
        text = f"layer {others[0]} is a plugin, which the model does not ask for: {_EXPORT_AGAIN}"
        yield Finding("other-plugin", text)


def _precedence_findings(network: NetworkFacts, built_by: tuple[str, str] | None, plugin: bool) -> Iterator[Finding]:
    """The exported node names its plugin's namespace, and the model's function is there or was removed by the rules."""
    ran = _mix_taken(network)
    if built_by is None or not ran:
        return
    builder, version = built_by
    removed = plugin and must_remove_function(builder, version)
    takes = parser_takes(builder, version, registered=plugin, function=not removed)
    if takes != ran:
        library = "with" if plugin else "without"
        text = (
            f"{title(builder)} {version} takes the {takes} of ExpertMix {library} a plugin library, the network has "
            f"the {ran}: build it again in a process that loads no other plugin"
        )
        yield Finding("expert-mix", text)


def _inspected_mix_findings(network: NetworkFacts, inspector: dict[str, Any] | None) -> Iterator[Finding]:
    """The compiled engine has to have what the parser made of the mix; `inspector` is what it told, if it told."""
    if inspector is None:
        return
    layers, ran = inspector["expert_mix"], _mix_taken(network)
    shown = "plugin" if layers["plugin"] else "function" if layers["function"] else ""
    if shown and ran and shown != ran:
        text = f"the network has the {ran} of ExpertMix, the engine's inspector shows the {shown}: please report it"
        yield Finding("expert-mix", text)


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
