"""What TensorRT's parser makes of a node that is both a model-local function and a registered plugin, by version.

Read in the sources and the changelog of the parser, and not run: no TensorRT has parsed an ExpertMix plugin so far. How
the nodes are written, with `plugin_namespace` and `plugin_version`: export.expert_mix. What a plugin library asks of
builder, flags and model is refused here, before any work.
"""

from typing import Literal

from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import EngineError, InputError
from moe3d_deploy.native.loading import MAX_EXPERTS, WIDTH_STEP
from moe3d_deploy.trt import BuildFlags, PluginLibrary, check_version, title
from moe3d_deploy.trt.features import Version, version_of

EXPERT_MIX = ("ExpertMix", "moe3d")  # name and domain of the function, as export.expert_mix writes it
Taken = Literal["function", "plugin"]
Rule = Literal["function first", "plugin first", "plugin if named", "function only"]

RULES: dict[str, tuple[tuple[Version, Rule], ...]] = {
    "tensorrt": (((10, 3), "function first"), ((10, 7), "plugin first"), ((10, 15), "plugin if named")),
    "tensorrt-rtx": (((1, 0), "function only"),),
}
"""Of each builder the rule, and the first version that has it; the newest first version is the last."""


def rule_of(builder: str, version: str) -> Rule:
    """The rule of this version. Raises EngineError for one that is too old to build engines here."""
    check_version(builder, version)
    numbers = version_of(version)
    return [rule for since, rule in RULES[builder] if numbers >= since][-1]


def parser_takes(
    builder: str,
    version: str,
    *,
    registered: bool,
    function: bool = True,
    named: bool = True,
    override: bool = False,
) -> Taken:
    """Whether a node becomes the function's operations or the plugin's layer.

    registered   a plugin of the node's name is in the registry
    function     the model has a function of that name; without one (it was removed) there is the plugin alone
    named        the node has the attribute `plugin_namespace`, as those that are exported here have
    override     the parser's flag ENABLE_PLUGIN_OVERRIDE is set

    Raises EngineError where the parser can take neither, InputError where a plugin ends its process.
    """
    rule = rule_of(builder, version)
    if registered and rule == "function only":
        refuse_plugin(builder)
    if not registered and not function:
        raise EngineError(
            f"{title(builder)} {version}: the model has no function for its plugin's node and no plugin is "
            "registered; export it again, or give the plugin library"
        )
    if not registered or not function:
        return "plugin" if registered else "function"
    if rule == "plugin if named":
        return "plugin" if named or override else "function"
    return "plugin" if rule == "plugin first" else "function"


def must_remove_function(builder: str, version: str) -> bool:
    """Whether the function has to leave the model before parsing for its plugin to be taken."""
    return rule_of(builder, version) == "function first"


def refuse_plugin(builder: str) -> None:
    """Raise InputError for a builder that must never see a plugin: TensorRT-RTX ends the process that has one."""
    if any(rule == "function only" for _, rule in RULES[builder]):
        raise InputError(
            f"--plugin: {title(builder)} takes no plugins, and one that is registered ends its process: leave it out, "
            "or build with TensorRT 10.3 or newer, on the machine that runs the engine"
        )


def check_plugin(builder: str, version: str, flags: BuildFlags, plugin: PluginLibrary | None) -> None:
    """Refuse a plugin library that this builder cannot use with these flags. Raises InputError; None is no plugin."""
    if plugin is None:
        return
    refuse_plugin(builder)
    plugin.check_version(version)
    if flags.version_compatible:
        raise InputError(
            "--plugin: a --version-compatible engine brings a runtime of its own, which has no plugin library of this "
            "process: leave one of them out"
        )


def check_model_for_plugin(config: ModelConfig, merged: bool, plugin: PluginLibrary | None) -> None:
    """Refuse a model in which the plugin has nothing to do, or whose sizes it does not take. Raises InputError."""
    if plugin is None:
        return
    moe = config.moe
    if moe is None or not merged:
        what = "no experts" if moe is None else "experts that are not merged (--no-merge)"
        raise InputError(f"--plugin: it mixes merged experts, and this model has {what}: leave it out")
    if moe.num_experts > MAX_EXPERTS:
        raise InputError(f"--plugin: it mixes at most {MAX_EXPERTS} experts, this model has {moe.num_experts}")
    for width in (moe.hidden_channels, moe.gate_hidden_channels):
        if width % WIDTH_STEP:
            raise InputError(f"--plugin: it takes widths that are multiples of {WIDTH_STEP}, this model has {width}")
