"""Weights without a config.json: what their shapes tell, what a preset lends, and what nobody can tell."""

import dataclasses
import warnings
from pathlib import Path

import pytest
from checkpoints import LEAST, small, tensors, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from moe3d_deploy.checkpoint import check_shapes, load_model, model_shapes, open_checkpoint, seeded_source
from moe3d_deploy.checkpoint_sizes import UNTOLD, check_modest, contradictions, infer_config, stored_sizes, with_sizes
from moe3d_deploy.config import PRESETS, ModelConfig, MoeConfig
from moe3d_deploy.errors import CheckpointError, InputError, Moe3dWarning

TINY, VGGT = PRESETS["moe3d-tiny"], PRESETS["vggt-1b"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_s_tensors_give_its_config_back(name: str) -> None:
    config, assumption = infer_config("x", model_shapes(PRESETS[name]))

    assert config == PRESETS[name]
    assert (assumption is None) == (name == "vggt-1b")


def test_vggt_without_its_point_head_is_still_vggt() -> None:
    without = dataclasses.replace(VGGT, point_head=False)
    assert infer_config("x", model_shapes(without)) == (without, None)


def test_an_expert_head_on_vggt_assumes_its_temperature() -> None:
    config = dataclasses.replace(VGGT, moe=MoeConfig(6, hidden_channels=48, gate_hidden_channels=24))

    inferred, assumption = infer_config("x", model_shapes(config))

    assert inferred == config
    assert assumption is not None
    assert (
        "sizes of moe3d-1b (but moe.num_experts 6, moe.hidden_channels 48, moe.gate_hidden_channels 24)" in assumption
    )
    assert "moe.temperature 1; if that is wrong, put a config.json beside it" in assumption


def test_what_is_assumed_is_said_in_one_warning(tmp_path: Path) -> None:
    write_folder(tmp_path / "mine", tensors(seeded_source("x", LEAST)), None)

    with pytest.warns(Moe3dWarning) as caught:
        source = open_checkpoint(tmp_path / "mine")

    assert source.config == LEAST
    assert [str(warning.message) for warning in caught] == [
        f"{tmp_path / 'mine'}: no config.json; its tensors have the sizes of moe3d-tiny (but vit.depth 1, "
        "camera_head.trunk_depth 1, dpt_head.features 16, dpt_head.out_channels [4, 8, 12, 16], vit.mlp_ratio 0.25, "
        "aggregator.mlp_ratio 0.25, img_size 28), and what they do not tell is taken from there: vit.num_heads 4, "
        "camera_head.num_heads 4, camera_head.num_iterations 4, aggregator.rope_freq 100, "
        "dpt_head.intermediate_layer_idx [0, 1, 2, 3], moe.temperature 1; if that is wrong, put a config.json beside it"
    ]
    assert load_model(source).config == LEAST


def test_a_config_that_is_there_is_not_warned_about(tmp_path: Path) -> None:
    write_folder(tmp_path, tensors(small()), small().config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_checkpoint(tmp_path).config == small().config
        (tmp_path / "config.json").unlink()
        assert open_checkpoint(tmp_path, config=small().config).config == small().config


def test_a_backbone_of_no_preset_is_refused_with_what_is_not_known(tmp_path: Path) -> None:
    write_folder(tmp_path, tensors(small()), None)

    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: no config.json, and no preset has its sizes (aggregator.embed_dim 64, aggregator.depth 6, "
        "aggregator.num_heads 2), so the weights alone do not tell vit.num_heads, camera_head.num_heads, "
        "camera_head.num_iterations, aggregator.rope_freq, dpt_head.intermediate_layer_idx; put their config.json "
        "beside them"
    )


@pytest.mark.parametrize(
    "gone",
    ["aggregator.camera_token", "aggregator.frame_blocks.3.attn.q_norm.bias", "aggregator.patch_embed.pos_embed"],
)
def test_without_a_config_a_missing_tensor_is_named_and_nothing_assumed(tmp_path: Path, gone: str) -> None:
    weights = tensors(seeded_source("x", LEAST))
    del weights[gone]
    write_folder(tmp_path, weights, None)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match=f"fit the config: missing '{gone}' "):
            open_checkpoint(tmp_path)


def test_one_misshapen_tensor_does_not_make_another_model() -> None:
    shapes = model_shapes(TINY)
    name = "aggregator.frame_blocks.0.norm1.weight"
    shapes[name] = (7,)

    config, _ = infer_config("x", shapes)

    with pytest.raises(CheckpointError, match=rf"fit the config: '{name}' is \(7,\), expected \(128,\)"):
        check_shapes("x", shapes, config)


def test_sizes_that_make_no_model_are_refused() -> None:
    shapes = model_shapes(TINY)
    shapes |= {name: (258, *shape[1:]) for name, shape in shapes.items() if "camera_head" in name and "norm" in name}

    with pytest.raises(CheckpointError, match=r"sizes of its tensors make no model \(model config: .*258.*put their c"):
        infer_config("x", shapes)


def test_a_number_in_a_key_builds_no_million_blocks() -> None:
    shapes = model_shapes(TINY) | {"aggregator.patch_embed.blocks.99999999.norm1.weight": (128,)}

    config, _ = infer_config("x", shapes)

    assert config.vit.depth == 4
    with pytest.raises(
        CheckpointError, match=r"unknown 'aggregator\.patch_embed\.blocks\.99999999\.norm1\.weight' \(c"
    ):
        check_shapes("x", shapes, config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vit": {"depth": 1001}}, r"vit\.depth is 1001, beyond any model \(at most 1000\)"),
        ({"moe": {"num_experts": 10**9}}, r"moe\.num_experts is 1e\+09, beyond any model"),
        ({"camera_head": {"num_iterations": 10**6}}, r"camera_head\.num_iterations is 1e\+06, beyond any model"),
        ({"dpt_head": {"out_channels": [4, 4, 4, 65540]}}, r"dpt_head\.out_channels is .*, beyond any"),
        ({"vit": {"mlp_ratio": 1e6}}, r"vit\.mlp_ratio is 1e\+06, beyond any model"),
    ],
)  # fmt: skip
def test_sizes_beyond_any_model_are_refused(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_modest(ModelConfig.from_dict(values))


def test_a_base_frequency_is_no_size() -> None:
    check_modest(ModelConfig.from_dict({"aggregator": {"rope_freq": 1e6}}))


COUNTS, RATIOS = st.integers(1, 3), st.floats(0.3, 3)
BLOCKS = {"depth": COUNTS, "mlp_ratio": RATIOS, "num_register_tokens": COUNTS}
EXPERTS = {"num_experts": COUNTS, "hidden_channels": COUNTS, "gate_hidden_channels": COUNTS}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Small configs that differ in every size that tensors tell."""
    heads, patch = draw(COUNTS), draw(COUNTS)
    width = heads * draw(st.sampled_from([4, 12, 20]))
    values = {
        "patch_size": patch,
        "img_size": patch * draw(COUNTS),
        "vit": {**draw(st.fixed_dictionaries(BLOCKS)), "embed_dim": width, "num_heads": 1},
        "aggregator": {**draw(st.fixed_dictionaries(BLOCKS)), "embed_dim": width, "num_heads": heads},
        "camera_head": {"dim_in": 2 * width, "num_heads": 1, "trunk_depth": draw(COUNTS)},
        "dpt_head": {
            "dim_in": 2 * width,
            "features": draw(st.sampled_from([8, 24])),
            "out_channels": draw(st.permutations([4, 8, 12, 16])),
            "intermediate_layer_idx": [0, 0, 0, 0],
        },
        "moe": draw(st.none() | st.fixed_dictionaries(EXPERTS)),
        "point_head": draw(st.booleans()),
    }
    return ModelConfig.from_dict(values)


@settings(max_examples=40, deadline=None)
@given(configs(), configs())
def test_tensors_tell_in_which_sizes_another_config_differs(config: ModelConfig, other: ModelConfig) -> None:
    shapes = model_shapes(config)

    assert contradictions(config, shapes) == []
    assert model_shapes(with_sizes(config, shapes)) == shapes
    assert model_shapes(with_sizes(other, shapes)) == shapes
    assert bool(contradictions(other, shapes)) == (model_shapes(other) != shapes)


def test_a_ratio_that_is_rounded_keeps_its_channels() -> None:
    """15 / 44 is a float of which 44 times are less than 15."""
    assert int(15 / 44 * 44) == 14
    ratio = stored_sizes(
        {"aggregator.frame_blocks.0.norm1.weight": (44,), "aggregator.frame_blocks.0.mlp.fc1.bias": (15,)}
    )
    assert int(ratio["aggregator.mlp_ratio"] * 44) == 15


def test_every_size_is_either_told_or_untold() -> None:
    """Both lists together are the config, but for what only training uses."""
    fields = {
        f"{part}.{leaf}" if isinstance(values, dict) else part
        for part, values in TINY.to_dict().items()
        for leaf in (values if isinstance(values, dict) else [""])
    }
    told = set(stored_sizes(model_shapes(TINY)))
    assert told & set(UNTOLD) == set()
    assert fields - told - set(UNTOLD) == {"vit.init_values", "aggregator.init_values"}
