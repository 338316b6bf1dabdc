"""A manifest of a split model: read strictly, refused by readers of the first version, and theirs still read."""

import dataclasses
import json
from typing import Any

import pytest
from manifests import ENGINE, example_engine, example_manifest

from moe3d_deploy.errors import BundleError, InputError
from moe3d_deploy.manifest import FileEntry, Manifest, Part, Tensor

TOKENS = Tensor("tokens_11", "float32", ("B", "S", "rows", "columns", 128), "patch tokens")
FILES = ("model.aggregator.onnx", "model.heads.onnx", ENGINE)


def split_manifest() -> Manifest:
    """The example's model in two parts, with an engine of the second."""
    single = example_manifest()
    parts = (
        Part("aggregator", FILES[0], single.inputs, (TOKENS,)),
        Part("heads", FILES[1], (TOKENS,), single.outputs),
    )
    return dataclasses.replace(
        single,
        parts=parts,
        model_file=FILES[0],
        format_version=2,
        engines=(dataclasses.replace(example_engine(), part="heads"),),
        files={name: FileEntry(3, "0" * 64) for name in FILES},
    )


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(json.dumps(values), source="bundle/manifest.json")
    message = str(caught.value)
    assert message.startswith("bundle/manifest.json: ")
    assert message.endswith("; copy the bundle again or export it again")
    return message


def test_what_was_written_is_read_again() -> None:
    manifest = Manifest.from_json(split_manifest().to_json())
    assert manifest == split_manifest()
    assert (manifest.split, manifest.model_files) == ("heads", FILES[:2])
    assert [part.per_view for part in manifest.parts] == [False, True]
    assert manifest.part("heads").file == FILES[1]


def test_a_model_of_one_file_is_written_as_before() -> None:
    """Version 1 without a new key, so that readers of that version go on reading it."""
    files = {name: FileEntry(3, "0" * 64) for name in ("model.onnx", ENGINE)}
    single = dataclasses.replace(example_manifest(), engines=(example_engine(),), files=files)
    values = json.loads(single.to_json())
    assert values["format_version"] == 1
    assert "parts" not in values
    assert "part" not in values["engines"][0]
    assert (single.split, single.model_files) == (None, ("model.onnx",))


def test_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        split_manifest().part("encoder")
    assert str(caught.value) == "bundle of moe3d-tiny has no part 'encoder': its parts are aggregator, heads"
    with pytest.raises(InputError, match="has no part 'heads': its model is one file$"):
        example_manifest().part("heads")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format_version", 1, "parts is unknown in format_version 1"),
        ("parts", None, "parts must be a list, not null"),
        ("parts", [], "parts must have the roles aggregator, heads or encoder, decoder, in this order"),
        ("parts.0.role", "decoder", "parts must have the roles aggregator, heads or encoder, decoder, in this order"),
        ("parts.0.role", "trunk", "parts[0].role must be one of aggregator, heads, encoder, decoder, not 'trunk'"),
        ("parts.1.file", FILES[0], "parts has a file twice"),
        ("parts.1.file", "engines/heads.onnx", "parts[1].file must lie in the bundle folder itself"),
        ("parts.1.file", "model.onnx", "parts[1].file 'model.onnx' is not among the files"),
        ("model_file", FILES[1], "model_file must be the first part's file"),
        ("parts.0.outputs", [], "parts[0].outputs must not be empty"),
        ("parts.1.inputs.0.name", "tokens_4", "parts[1].inputs has 'tokens_4', which neither the model takes nor a"),
        ("parts.1.inputs.0.dtype", "uint8", "parts[1].inputs has another 'tokens_11' than is given"),
        ("parts.1.inputs.0.shape.4", 64, "parts[1].inputs has another 'tokens_11' than is given"),
        ("parts.1.outputs.0.name", "points", "outputs has 'depth', which no part gives"),
        ("engines.0.part", "encoder", "engines[0].part must be one of aggregator, heads"),
        ("engines.0.part", None, "engines[0].part must be one of aggregator, heads"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(path: str, value: Any, message: str) -> None:
    values = json.loads(split_manifest().to_json())
    inner: Any = values
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    for key in parents:
        inner = inner[key]
    inner[last] = value
    assert message in refusal(values)


@pytest.mark.parametrize("key", ["parts", "engines.0.part"])
def test_the_new_keys_belong_to_the_second_version_alone(key: str) -> None:
    split = json.loads(split_manifest().to_json())
    single = json.loads(split_manifest().to_json()) | {"format_version": 1}
    if key == "parts":
        del split["parts"]
    else:
        del split["engines"][0]["part"], single["parts"]
    shown = key.replace(".0", "[0]")
    assert f"{shown} is missing" in refusal(split)
    assert f"{shown} is unknown in format_version 1" in refusal(single)


def test_an_axis_may_be_fixed_on_one_side() -> None:
    """A part that is per view takes any number of views, of which the other part has a fixed one."""
    manifest = split_manifest()
    fixed = dataclasses.replace(TOKENS, shape=(1, 4, "rows", "columns", 128))
    parts = (dataclasses.replace(manifest.parts[0], outputs=(fixed,)), manifest.parts[1])
    Manifest.from_json(dataclasses.replace(manifest, parts=parts).to_json())
