"""Keys and shapes against the model: one error that lists what does not fit, and the prefixes that wrappers put."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import GAMMA, NORM, small, tensors, write_folder
from hypothesis import given
from hypothesis import strategies as st

from moe3d_deploy.checkpoint import check_shapes, load_model, model_shapes, open_checkpoint
from moe3d_deploy.checkpoint_keys import PREFIXES, common_prefix
from moe3d_deploy.config import PRESETS, ModelConfig, MoeConfig
from moe3d_deploy.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]
KEYS = sorted(model_shapes(PRESETS["moe3d-tiny"]))


def refusal(edit: Callable[[Shapes], object], config: ModelConfig | None = None) -> str:
    """How the small model's shapes are refused after `edit`."""
    config = config or small().config
    shapes = model_shapes(config)
    edit(shapes)
    with pytest.raises(CheckpointError) as error:
        check_shapes("x", shapes, config)
    message = str(error.value)
    assert message.startswith("x: ")
    assert "\n" not in message
    return message


# What does not fit


def test_tensors_that_do_not_fit_are_listed_three_at_most_with_the_closest_key() -> None:
    def edit(shapes: Shapes) -> None:
        shapes["camera_head.token_nrm.weight"] = shapes.pop(NORM)
        shapes[GAMMA] = (7,)
        for i in range(3):
            del shapes[f"depth_head.projects.{i}.bias"]

    message = refusal(edit)

    assert f"unknown 'camera_head.token_nrm.weight' (closest known: '{NORM}')" in message
    assert f"missing '{NORM}' (128,)" in message
    assert message.count("missing") == 2
    assert "; and 3 more. Check the config.json beside the weights" in message


def test_a_misshapen_tensor_is_named_with_both_shapes() -> None:
    assert f"'{GAMMA}' is (7,), expected (64,). Check" in refusal(lambda shapes: shapes.update({GAMMA: (7,)}))


def test_a_very_long_name_is_neither_compared_nor_shown_whole() -> None:
    message = refusal(lambda shapes: shapes.update({"x" * 1_000_000: (1,)}))
    assert "unknown 'xxx" in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("held", "wanted", "sizes", "remedy"),
    [
        (
            8,
            4,
            "moe.num_experts is 4 in the config, 8 in the tensors",
            "hold 8 experts, the config says 4: set moe.num",
        ),
        (
            2,
            4,
            "moe.num_experts is 4 in the config, 2 in the tensors",
            "hold 2 experts, the config says 4: set moe.num",
        ),
        (
            4,
            0,
            "moe.num_experts is 0 in the config, 4 in the tensors",
            "hold 4 experts, the config none: put their con",
        ),
        (
            0,
            4,
            "moe.num_experts is 4 in the config, 0 in the tensors",
            'hold no experts: set "moe" to null in config.j',
        ),
    ],
)
def test_another_number_of_experts_is_named_with_the_config_s(held: int, wanted: int, sizes: str, remedy: str) -> None:
    configs = [dataclasses.replace(small().config, moe=MoeConfig(k) if k else None) for k in (held, wanted)]

    with pytest.raises(CheckpointError) as error:
        check_shapes("x", model_shapes(configs[0]), configs[1])
    assert str(error.value).startswith(f"x: weights do not fit the config: {sizes}. The weights {remedy}")


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("vit", {"depth": 3}, "vit.depth is 4 in the config, 3 in the tensors"),
        ("vit", {"mlp_ratio": 2.0}, "vit.mlp_ratio is 4 in the config, 2 in the tensors"),
        ("aggregator", {"num_heads": 4}, "aggregator.num_heads is 2 in the config, 4 in the tensors"),
        ("vit", {"num_register_tokens": 1}, "vit.num_register_tokens is 4 in the config, 1 in the tensors"),
        ("camera_head", {"trunk_depth": 1}, "camera_head.trunk_depth is 2 in the config, 1 in the tensors"),
        ("dpt_head", {"features": 64}, "dpt_head.features is 32 in the config, 64 in the tensors"),
        (
            "dpt_head", {"out_channels": (16, 32, 64, 128)},
            "dpt_head.out_channels is [16, 32, 64, 64] in the config, [16, 32, 64, 128] in the tensors",
        ),
    ],
)  # fmt: skip
def test_a_size_that_config_and_tensors_disagree_on_is_all_that_is_named(part: str, values: dict, message: str) -> None:
    stored = dataclasses.replace(small().config, **{part: dataclasses.replace(getattr(small().config, part), **values)})

    with pytest.raises(CheckpointError) as error:
        check_shapes("x", model_shapes(stored), small().config)
    assert str(error.value) == (
        f"x: weights do not fit the config: {message}. Check the config.json beside the weights, or name weights of "
        f"this architecture"
    )


def test_another_image_size_and_an_absent_point_head_are_named_together() -> None:
    stored = dataclasses.replace(small().config, img_size=70, point_head=False)

    with pytest.raises(CheckpointError, match="point_head is true in the config, false in the tensors; img_size is 56"):
        check_shapes("x", model_shapes(stored), small().config)


def test_tensors_of_another_size_are_still_searched_for_a_missing_one() -> None:
    stored = model_shapes(dataclasses.replace(small().config, moe=MoeConfig(8)))
    del stored[NORM]

    with pytest.raises(
        CheckpointError, match=rf"is 0 in the config, 8 in the tensors; missing '{NORM}' \(128,\)\. The"
    ):
        check_shapes("x", stored, small().config)


@pytest.mark.parametrize("part", ["camera_head", "depth_head", "aggregator"])
def test_an_absent_part_is_named(part: str) -> None:
    def edit(shapes: Shapes) -> None:
        for name in [name for name in shapes if name.startswith(part)]:
            del shapes[name]

    assert refusal(edit).endswith(f"The weights hold no {part}, which every model here has: name weights with it")


def test_weights_of_another_project_are_called_that(tmp_path: Path) -> None:
    write_folder(tmp_path, {"encoder.layer.0.weight": torch.ones(3)}, None)

    with pytest.raises(CheckpointError, match=r"unknown 'encoder.*It holds none of VGGT's tensors: name VGGT or MoE3D"):
        open_checkpoint(tmp_path)


def test_only_the_track_head_is_tolerated(tmp_path: Path) -> None:
    weights = tensors(small())
    write_folder(tmp_path, weights | {"track_head.tracker.x": torch.ones(3)}, small().config)
    assert open_checkpoint(tmp_path).shapes() == small().shapes()

    write_folder(tmp_path, weights | {"tracker.x": torch.ones(3)}, small().config)
    with pytest.raises(CheckpointError, match=r"unknown 'tracker\.x'"):
        open_checkpoint(tmp_path)


# Prefixes


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module.model.", "module._orig_mod.module."])
def test_a_prefix_of_all_keys_is_taken_off(tmp_path: Path, prefix: str) -> None:
    weights = tensors(small()) | {"track_head.x": torch.ones(1)}
    write_folder(tmp_path, {prefix + name: tensor for name, tensor in weights.items()}, small().config)

    source = open_checkpoint(tmp_path)

    assert source.shapes() == small().shapes()
    assert torch.equal(load_model(source).state_dict()[NORM], small().tensor(NORM))


@pytest.mark.parametrize(
    ("bare", "message"),
    [
        ([NORM], f"of 447 keys begin with 'model.' and the others do not ('{NORM}'); save the state dict of the model"),
        (["loss.weight"], "of 448 keys begin with 'model.' and the others do not ('loss.weight'); save"),
        (["a", "b", "c", "d", "e"], "keys begin with 'model.' and the others do not ('a'; 'b'; 'c'; and 2 more); save"),
    ],
)
def test_a_prefix_of_some_keys_is_refused(bare: list[str], message: str) -> None:
    def edit(shapes: Shapes) -> None:
        for name in [name for name in shapes if name not in bare]:
            shapes["model." + name] = shapes.pop(name)
        shapes.update(dict.fromkeys(bare, (1,)))

    assert message in refusal(edit)


def test_one_prefixed_key_among_bare_ones_is_the_one_named() -> None:
    message = refusal(lambda shapes: shapes.update({"module.x": (1,)}))
    assert "1 of 448 keys begin with 'module.' and the others do not ('module.x'); save" in message


def test_a_track_head_without_the_prefix_does_not_keep_it_on() -> None:
    assert common_prefix(["model.aggregator.camera_token", "track_head.x"]) == "model."
    assert common_prefix(["track_head.x"]) == ""
    assert common_prefix([]) == ""


@given(st.lists(st.sampled_from(PREFIXES), max_size=4), st.sets(st.sampled_from(KEYS), min_size=1))
def test_whatever_was_put_before_every_key_is_found(prefixes: list[str], keys: set[str]) -> None:
    whole = "".join(prefixes)
    assert common_prefix([whole + key for key in keys]) == whole


@given(st.lists(st.tuples(st.lists(st.sampled_from([*PREFIXES, "x."]), max_size=3), st.sampled_from(KEYS)), min_size=1))
def test_a_prefix_is_one_of_all_names_and_leaves_them_apart(named: list[tuple[list[str], str]]) -> None:
    names = ["".join(prefixes) + key for prefixes, key in named]
    prefix = common_prefix(names)
    stripped = [name.removeprefix(prefix) for name in names]

    assert all(name.startswith(prefix) for name in names)
    assert len(set(stripped)) == len(set(names))
    assert not any(all(name.startswith(known) for name in stripped) for known in PREFIXES), "more could be taken off"
    rest = prefix
    while rest:
        rest = next(rest.removeprefix(known) for known in PREFIXES if rest.startswith(known))
