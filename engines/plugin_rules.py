"""What TensorRT's parser makes of a node that is both a model-local function and a registered plugin, by version.

Read in the sources and the changelog of the parser, and not run: no TensorRT has parsed an ExpertMix plugin so far. How
the nodes are written, with `plugin_namespace` and `plugin_version`: export.expert_mix.
"""

from typing import Literal

from moe3d_deploy.errors import EngineError
from moe3d_deploy.trt import check_version, title
from moe3d_deploy.trt.features import Version, version_of

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

    Raises EngineError where the parser can take neither, or ends the process.
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
    """Raise EngineError for a builder that must never see a plugin: TensorRT-RTX ends the process that has one."""
    if any(rule == "function only" for _, rule in RULES[builder]):
        raise EngineError(
            f"{title(builder)} takes no plugins, and one that is registered ends its process: leave the plugin out, "
            "or build with TensorRT"
        )
