"""Model configurations: what their JSON form may hold, and the one line that names what it may not."""

import copy
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import golden_config, read_golden

from moe3d_deploy.config import (
    PRESETS,
    AggregatorConfig,
    CameraHeadConfig,
    DptHeadConfig,
    ModelConfig,
    MoeConfig,
    VitConfig,
)
from moe3d_deploy.errors import InputError

VGGT = ModelConfig().to_dict()


def changed(path: str, value: Any) -> dict[str, Any]:
    """VGGT-1B's JSON with 4 experts and the entry at `path` ("vit.depth") set to `value`."""
    values = copy.deepcopy(VGGT) | {"moe": dataclasses.asdict(MoeConfig())}
    *parents, last = path.split(".")
    owner = values
    for parent in parents:
        owner = owner[parent]
    owner[last] = value
    return values


@pytest.mark.parametrize("config", [*PRESETS.values(), golden_config()], ids=[*PRESETS, "golden-tiny"])
def test_json_form_gives_the_same_config_back(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_json_form_has_the_keys_of_the_golden_files() -> None:
    golden = json.loads(read_golden("full_1x2x3x140x196")["config"])

    assert golden.pop("preset") == "vggt_1b"
    assert golden | {"moe": None, "point_head": True} == VGGT


def test_absent_keys_have_vggt_1bs_values_no_experts_and_a_point_head() -> None:
    assert ModelConfig.from_dict({}) == ModelConfig() == PRESETS["vggt-1b"]
    config = ModelConfig.from_dict({"vit": {"depth": 12}, "moe": {"num_experts": 8}})
    assert config == ModelConfig(vit=VitConfig(depth=12), moe=MoeConfig(num_experts=8))
    assert ModelConfig().moe is None
    assert ModelConfig().point_head


def test_defaults_are_those_of_the_specification() -> None:
    config = ModelConfig()

    assert (config.img_size, config.patch_size, config.pos_embed_grid, config.token_dim) == (518, 14, 37, 2048)
    assert dataclasses.astuple(config.vit) == (1024, 24, 16, 4.0, 4, 1.0)
    assert dataclasses.astuple(config.aggregator) == (1024, 24, 16, 4.0, 4, 100.0, 0.01)
    assert dataclasses.astuple(config.camera_head) == (2048, 4, 16, 4)
    assert dataclasses.astuple(config.dpt_head) == (2048, 256, (256, 512, 1024, 1024), (4, 11, 17, 23))
    assert dataclasses.astuple(MoeConfig()) == (4, 32, 32, 1.0)
    assert PRESETS["moe3d-1b"] == dataclasses.replace(config, moe=MoeConfig())


def test_the_preset_key_is_ignored() -> None:
    assert ModelConfig.from_dict({"preset": "whatever"}) == ModelConfig()


def test_from_dict_leaves_its_argument_alone() -> None:
    values = {"preset": "x", "vit": {"depth": 12}, "moe": None}
    before = copy.deepcopy(values)

    ModelConfig.from_dict(values)

    assert values == before


def test_numbers_become_the_type_of_their_field() -> None:
    """JSON writers do not keep 4 and 4.0 apart."""
    config = ModelConfig.from_dict({"vit": {"mlp_ratio": 4, "depth": 24.0}, "aggregator": {"rope_freq": 100}})

    assert [type(config.vit.mlp_ratio), type(config.vit.depth), type(config.aggregator.rope_freq)] == [
        float,
        int,
        float,
    ]


def test_a_config_is_frozen_and_can_be_a_key() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().img_size = 14  # type: ignore[misc]
    assert {ModelConfig(): 1}[ModelConfig.from_dict({})] == 1


WRONG_VALUES = [
    # what is not of the field's type
    ("vit", 3, "model config.vit: expected an object, got int"),
    ("vit", None, "model config.vit: expected an object, got NoneType"),
    ("moe", [], "model config.moe: expected an object, got list"),
    ("img_size", "518", "model config.img_size: expected int, got '518'"),
    ("img_size", True, "model config.img_size: expected int, got True"),
    ("img_size", 518.5, "model config.img_size: expected int, got 518.5"),
    ("img_size", None, "model config.img_size: expected int, got None"),
    ("img_size", float("nan"), "model config.img_size: expected int, got nan"),
    ("img_size", float("inf"), "model config.img_size: expected int, got inf"),
    ("vit.mlp_ratio", float("inf"), "model config.vit.mlp_ratio: expected float, got inf"),
    ("vit.mlp_ratio", "4", "model config.vit.mlp_ratio: expected float, got '4'"),
    ("moe.temperature", None, "model config.moe.temperature: expected float, got None"),
    ("point_head", 1, "model config.point_head: expected bool, got 1"),
    ("point_head", None, "model config.point_head: expected bool, got None"),
    ("dpt_head.out_channels", 256, "model config.dpt_head.out_channels: expected a list of 4 integers, got 256"),
    (
        "dpt_head.out_channels",
        [256, 512, 1024],
        "model config.dpt_head.out_channels: expected a list of 4 integers, got [256, 512, 1024]",
    ),
    ("dpt_head.out_channels", [256, 512, "x", 4], "model config.dpt_head.out_channels[2]: expected int, got 'x'"),
    # unknown keys
    ("colour", 1, "model config: unknown key 'colour'; known are img_size, patch_size, vit, aggregator, camera_head, "),
    ("moe.top_k", 2, "model config.moe: unknown key 'top_k'; known are num_experts, hidden_channels, "),
    # sizes that make no model
    ("img_size", 0, "model config: img_size must be positive"),
    ("patch_size", -14, "model config: patch_size must be positive"),
    ("img_size", 520, "model config: img_size must be a multiple of patch_size"),
    ("vit.depth", 0, "model config: depth must be positive, got 0"),
    ("moe.num_experts", 0, "model config: num_experts must be positive, got 0"),
    ("moe.temperature", 0, "model config: temperature must be positive, got 0.0"),
    ("moe.temperature", -1.5, "model config: temperature must be positive, got -1.5"),
    ("camera_head.num_iterations", 0, "model config: num_iterations must be positive, got 0"),
    ("vit.embed_dim", 512, "model config: vit.embed_dim and aggregator.embed_dim must be equal"),
    ("vit.num_heads", 15, "model config: vit: width 1024 is not a multiple of 15 heads"),
    ("aggregator.num_heads", 3, "model config: aggregator: width 1024 is not a multiple of 3 heads"),
    ("camera_head.num_heads", 5, "model config: camera_head: width 2048 is not a multiple of 5 heads"),
    (
        "aggregator.num_heads",
        512,
        "model config: aggregator: the head width must be a multiple of 4 for 2D rotary embedding",
    ),
    ("camera_head.dim_in", 1024, "model config: camera_head.dim_in must be 2048 (2 x embed_dim)"),
    ("dpt_head.dim_in", 1024, "model config: dpt_head.dim_in must be 2048 (2 x embed_dim)"),
    ("vit.mlp_ratio", 9e-4, "model config: vit: mlp_ratio 0.0009 leaves its MLP without a channel"),
    ("aggregator.mlp_ratio", 9e-4, "model config: aggregator: mlp_ratio 0.0009 leaves its MLP without a channel"),
    ("dpt_head.features", 100, "model config: dpt_head.features must be a multiple of 8"),
    ("dpt_head.out_channels", [256, 512, 0, 4], "model config: dpt_head.out_channels must be multiples of 4"),
    ("dpt_head.out_channels", [256, 510, 4, 4], "model config: dpt_head.out_channels must be multiples of 4"),
    (
        "dpt_head.intermediate_layer_idx",
        [4, 11, 17, 24],
        "model config: dpt_head.intermediate_layer_idx must lie in 0..23",
    ),
    (
        "dpt_head.intermediate_layer_idx",
        [-1, 11, 17, 23],
        "model config: dpt_head.intermediate_layer_idx must lie in 0..23",
    ),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG_VALUES, ids=str)
def test_a_wrong_value_is_named_in_one_line(path: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelConfig.from_dict(changed(path, value))

    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [None, [], "vggt-1b", 3])
def test_what_is_no_object_is_refused(values: Any) -> None:
    with pytest.raises(InputError, match=f"^model config: expected an object, got {type(values).__name__}$"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize("path", ["img_size", "vit.mlp_ratio"])
def test_an_integer_beyond_all_floats_is_refused(path: str) -> None:
    """JSON has no largest number; Python reads this one as an int that no float can hold."""
    with pytest.raises(InputError, match=rf"^model config\.{path}: expected (int|float), got 10+$"):
        ModelConfig.from_dict(changed(path, 10**400))


def test_sizes_are_checked_however_a_config_is_made() -> None:
    with pytest.raises(InputError, match="^model config: img_size must be a multiple of patch_size$"):
        ModelConfig(img_size=500)
    with pytest.raises(InputError, match="^model config: num_experts must be positive, got -1$"):
        dataclasses.replace(ModelConfig(), moe=MoeConfig(num_experts=-1))


def test_one_channel_is_enough_for_an_mlp() -> None:
    ratio = 1 / 1024  # of VGGT-1B's width of 1024
    assert ModelConfig.from_dict(changed("vit.mlp_ratio", ratio)).vit.mlp_ratio == ratio


CLASSES = (ModelConfig, VitConfig, AggregatorConfig, CameraHeadConfig, DptHeadConfig, MoeConfig)
KEYS = sorted({field.name for cls in CLASSES for field in dataclasses.fields(cls)})

keys = st.sampled_from([*KEYS, "preset"]) | st.text(max_size=5)
numbers = st.sampled_from([0, 1, 4, 14, 24, 64, 1024, 2048, 2.0, 10**400]) | st.integers() | st.floats()
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5),
    lambda values: st.lists(values, max_size=5) | st.dictionaries(keys, values, max_size=6),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(keys, json_values, max_size=8))
def test_any_json_gives_a_config_or_an_input_error_of_one_line(values: dict[str, Any]) -> None:
    check_gives_config_or_input_error(values)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([f"{part}.{key}" for part, entry in VGGT.items() if isinstance(entry, dict) for key in entry]),
    json_values,
)
def test_any_value_of_a_known_key_gives_a_config_or_an_input_error_of_one_line(path: str, value: Any) -> None:
    check_gives_config_or_input_error(changed(path, value))


def check_gives_config_or_input_error(values: dict[str, Any]) -> None:
    message = ""
    try:
        config = ModelConfig.from_dict(values)
    except InputError as error:
        message = str(error)
    else:
        assert ModelConfig.from_dict(config.to_dict()) == config
    assert message.isprintable()
