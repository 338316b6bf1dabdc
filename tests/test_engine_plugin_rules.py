"""Whether TensorRT's parser takes the function or the plugin of a node, version by version."""

import pytest

from moe3d_deploy.engines.plugin_rules import RULES, must_remove_function, parser_takes, refuse_plugin, rule_of
from moe3d_deploy.errors import EngineError, InputError

RTX, TENSORRT = "tensorrt-rtx", "tensorrt"


@pytest.mark.parametrize("version", ["10.3.0.26", "10.7.0.23", "10.14.1.48", "10.15.1.29", "11.4.0.106"])
def test_without_a_plugin_the_function_is_taken(version: str) -> None:
    assert parser_takes(TENSORRT, version, registered=False) == "function"
    assert parser_takes(TENSORRT, version, registered=False, named=False, override=True) == "function"


@pytest.mark.parametrize(
    ("version", "plain", "named", "override"),
    [
        ("10.3.0.26", "function", "function", "function"),
        ("10.6.0.26", "function", "function", "function"),
        ("10.7.0.23", "plugin", "plugin", "plugin"),
        ("10.14.1.48", "plugin", "plugin", "plugin"),
        ("10.15.1.29", "function", "plugin", "plugin"),
        ("10.16.1.11", "function", "plugin", "plugin"),
        ("11.0.0.1", "function", "plugin", "plugin"),
        ("11.4.0.106", "function", "plugin", "plugin"),
    ],
)
def test_a_registered_plugin_is_taken_by_version_attribute_and_flag(
    version: str, plain: str, named: str, override: str
) -> None:
    assert parser_takes(TENSORRT, version, registered=True, named=False) == plain
    assert parser_takes(TENSORRT, version, registered=True) == named
    assert parser_takes(TENSORRT, version, registered=True, named=False, override=True) == override


def test_a_model_without_the_function_has_the_plugin_alone() -> None:
    for version in ("10.3.0.26", "10.7.0.23", "11.0.0.1"):
        assert parser_takes(TENSORRT, version, registered=True, function=False, named=False) == "plugin"
    with pytest.raises(
        EngineError, match=r"^TensorRT 10\.16\.1: the model has no function .* no plugin is registered; "
    ):
        parser_takes(TENSORRT, "10.16.1", registered=False, function=False)


def test_only_the_oldest_need_the_function_removed() -> None:
    needed = [
        version
        for version in ("10.3.0", "10.6.9", "10.7.0", "10.15.0", "11.1")
        if must_remove_function(TENSORRT, version)
    ]
    assert needed == ["10.3.0", "10.6.9"]
    assert not must_remove_function(RTX, "1.7.1.116")


def test_tensorrt_rtx_never_sees_a_plugin() -> None:
    assert parser_takes(RTX, "1.7.1.116", registered=False) == "function"
    with pytest.raises(InputError) as caught:
        refuse_plugin(RTX)
    assert str(caught.value) == (
        "--plugin: TensorRT-RTX takes no plugins, and one that is registered ends its process: leave it out, or build "
        "with TensorRT 10.3 or newer, on the machine that runs the engine"
    )
    with pytest.raises(InputError, match="TensorRT-RTX takes no plugins"):
        parser_takes(RTX, "1.7.1.116", registered=True, function=False)
    refuse_plugin(TENSORRT)


def test_versions_that_build_no_engines_have_no_rule() -> None:
    with pytest.raises(EngineError, match=r"^TensorRT 10\.2\.0 is too old: engines are built by 10\.3 or newer"):
        rule_of(TENSORRT, "10.2.0")
    for rules in RULES.values():
        versions = [since for since, _ in rules]
        assert versions == sorted(versions)
