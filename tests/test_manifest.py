"""A manifest is read strictly: a test per bad input, and whatever is wrong is one BundleError on one line."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifests import ENGINE, example_engine, example_manifest

from moe3d_deploy.config import PRESETS
from moe3d_deploy.errors import BundleError
from moe3d_deploy.manifest import FORMAT_VERSION, PIECE_BYTES, FileEntry, Manifest, Range, ShapeRanges, Verification
from moe3d_deploy.strict_json import MAX_BYTES, MAX_DEPTH


def example_json() -> dict[str, Any]:
    """The JSON form of an example with an engine and its files, as Python objects to spoil."""
    files = {name: FileEntry(size=3, sha256="0" * 64) for name in ("model.onnx", "model.onnx.data", ENGINE)}
    manifest = dataclasses.replace(example_manifest(), engines=(example_engine(),), files=files)
    return json.loads(manifest.to_json())


def changed(path: str, value: Any) -> str:
    """The example's text with the value at a dotted path replaced."""
    values = example_json()
    inner: Any = values
    *parents, last = path.split(".")
    for key in parents:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[int(last) if isinstance(inner, list) else last] = value
    return json.dumps(values)


def refusal(text: str) -> str:
    """The message that `text` is refused with."""
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(text, source="bundle/manifest.json")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("bundle/manifest.json")
    assert "again" in message or "update" in message, "the message names no remedy"
    return message


def test_reading_what_was_written_gives_the_same_manifest() -> None:
    manifest = Manifest.from_json(json.dumps(example_json()))
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.engines == (example_engine(),)
    assert manifest.config == PRESETS["moe3d-tiny"]


def test_pieces_are_there_for_large_files_alone_and_cover_them() -> None:
    values = example_json()
    assert all("pieces" not in entry for entry in values["files"].values())
    large = {"size": 2 * PIECE_BYTES + 1, "sha256": "0" * 64, "pieces": ["1" * 64, "2" * 64, "3" * 64]}
    values["files"]["model.onnx.data"] = large
    entry = Manifest.from_json(json.dumps(values)).files["model.onnx.data"]
    assert entry.pieces == tuple(large["pieces"])
    with pytest.raises(BundleError, match="pieces must have 3 digests for 134217729 bytes"):
        FileEntry(entry.size, entry.sha256, entry.pieces[:2])
    with pytest.raises(BundleError, match="pieces must be 64 lower-case hex digits"):
        FileEntry(entry.size, entry.sha256, (*entry.pieces[:2], "F" * 64))


def test_the_text_is_the_same_for_any_order_of_keys_and_ends_with_a_newline() -> None:
    values = example_json()
    reordered = dict(reversed(values.items()))
    text = Manifest.from_json(json.dumps(reordered)).to_json()
    assert text == Manifest.from_json(json.dumps(values)).to_json()
    assert text.endswith("}\n")
    assert text.startswith('{\n  "checkpoint": {\n    "licence"')


@pytest.mark.parametrize(("version", "remedy"), [(FORMAT_VERSION + 1, "update moe3d-deploy"), (0, "export the bundle")])
def test_another_format_version_is_refused_by_number_whatever_else_the_file_holds(version: int, remedy: str) -> None:
    message = refusal(json.dumps({"format_version": version, "unheard_of": 1}))
    assert f"format_version {version}" in message
    assert remedy in message


@pytest.mark.parametrize("text", ["", "manifest", "{", '{"name": "a",}', "\ufeff{}", "{} {}"])
def test_text_that_is_not_json_is_refused(text: str) -> None:
    assert "is not JSON" in refusal(text)


@pytest.mark.parametrize("text", ["[]", "1", "null", '"a"'])
def test_json_that_is_no_object_is_refused(text: str) -> None:
    assert "the top level must be an object" in refusal(text)


def test_every_truncation_of_a_manifest_is_refused() -> None:
    text = Manifest.from_json(json.dumps(example_json())).to_json().rstrip()
    for length in range(0, len(text), 97):
        refusal(text[:length])
    refusal(text[:-1])


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"name": {"deep": [{"b": 1, "c": 2, "b": 3}]}}'])
def test_a_key_that_comes_twice_is_refused(text: str) -> None:
    assert "twice" in refusal(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_json_does_not_have_is_refused(number: str) -> None:
    assert f"has {number}, which JSON does not allow" in refusal(f'{{"verification": {number}}}')


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_a_number_that_overflows_is_refused(number: str) -> None:
    assert "not finite" in refusal(f'{{"verification": {number}}}')


@pytest.mark.parametrize("number", [str(2**63), str(-(2**63) - 1), "9" * 20, "9" * 5000])
def test_an_integer_beyond_64_bits_is_refused(number: str) -> None:
    assert "beyond 64 bits" in refusal(f'{{"opset": {number}}}')


def test_a_string_that_is_no_unicode_text_is_refused() -> None:
    assert "not Unicode text" in refusal('{"name": "\\ud800"}')


def test_nesting_is_refused_just_beyond_the_limit_and_far_beyond_the_interpreters() -> None:
    """The example's audit is at depth 4: top level, engines, record, audit."""
    spare = MAX_DEPTH - 4
    deepest: Any = 0
    for _ in range(spare):
        deepest = [deepest]
    Manifest.from_json(changed("engines.0.audit", {"a": deepest}))
    assert f"nested more than {MAX_DEPTH} deep" in refusal(changed("engines.0.audit", {"a": [deepest]}))
    for bracket in ("[", '{"a":'):
        assert f"nested more than {MAX_DEPTH} deep" in refusal(bracket * 200_000)


def test_a_text_beyond_the_size_limit_is_refused_and_one_at_the_limit_is_not() -> None:
    text = json.dumps(example_json())
    at_limit = text + " " * (MAX_BYTES - len(text))
    Manifest.from_json(at_limit)
    assert f"has {MAX_BYTES + 1} bytes" in refusal(at_limit + " ")


def test_every_key_is_required_and_no_other_is_known_at_any_level() -> None:
    for path in ("", "checkpoint", "preprocessing", "shape_ranges", "shape_ranges.views", "verification", "engines.0"):
        values = example_json()
        inner: Any = values
        for key in path.split(".") if path else []:
            inner = inner[int(key)] if isinstance(inner, list) else inner[key]
        for key in list(inner):
            kept = inner.pop(key)
            assert f"{key} is missing" in refusal(json.dumps(values))
            inner[key] = kept
        inner["colour"] = 1
        assert "'colour' is unknown" in refusal(json.dumps(values))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format_version", "1", "format_version must be int"),
        ("format_version", True, "format_version must be int"),
        ("format_version", 1.0, "format_version must be int"),
        ("name", "", "name must be non-empty text"),
        ("name", "a\nb", "name must be non-empty text without control characters, not 'a\\nb'"),
        ("name", "\x1b[31m", "name must be non-empty text without control characters"),
        ("name", 3, "name must be str, not 3"),
        ("created_by", {"torch": 2}, "created_by['torch'] must be str"),
        ("model_config", {"img_size": 0}, "model_config: model config: img_size must be positive"),
        ("model_config", {"colour": 1}, "unknown key 'colour'"),
        ("checkpoint.sha256", "ABC", "checkpoint.sha256 must be 64 lower-case hex digits"),
        ("checkpoint.origin", "/data/model.pt", "checkpoint.origin must be a base name"),
        ("checkpoint.origin", "C:\\model.pt", "checkpoint.origin must be a base name"),
        ("preprocessing.mean", [0, 0], "preprocessing.mean must have 3 entries, not 2"),
        ("preprocessing.mean", [0, 0, "0"], "preprocessing.mean[2] must be float"),
        ("preprocessing.std", [1, 0, 1], "preprocessing.std must be positive"),
        ("preprocessing.size", 0, "preprocessing.size and patch_size must be positive"),
        ("inputs", [], "inputs must not be empty"),
        ("inputs", {}, "inputs must be a list, not an object"),
        ("inputs.0.dtype", "float64", "inputs[0].dtype must be float32 or uint8, not 'float64'"),
        ("inputs.0.shape", ["B", 0], "inputs[0].shape has 0"),
        ("inputs.0.shape", ["B", True], "inputs[0].shape[1] must be str"),
        ("inputs.0.shape", ["2 x B"], "inputs[0].shape has '2 x B'"),
        ("outputs.1.name", "depth", "outputs has a name twice"),
        ("opset", 0, "opset must be positive"),
        ("opset", 20.0, "opset must be int"),
        ("merged_experts", 1, "merged_experts must be bool"),
        ("shape_ranges.views", {"min": 0, "max": 2, "step": 1}, "shape_ranges.views.min and step must be positive"),
        ("shape_ranges.views", {"min": 3, "max": 2, "step": 1}, "shape_ranges.views.max must not be below min"),
        ("model_file", "other.onnx", "model_file 'other.onnx' is not among the files"),
        ("model_file", ENGINE, "model_file must lie in the bundle folder"),
        ("files", [], "files must be an object, not a list"),
        ("files", {}, "'model.onnx' is not among the files"),
        ("engines.0.builder", "tvm", "engines[0].builder must be one of tensorrt, tensorrt-rtx"),
        ("engines.0.compute_capabilities", [], "engines[0].compute_capabilities must not be empty"),
        ("engines.0.profiles", [], "engines[0].profiles must not be empty"),
        ("engines.0.profiles.0.min", [1, 5, 392, 518], "engines[0].profiles[0].min <= opt <= max must hold"),
        ("engines.0.file", "model.onnx", "engines[0].file must lie in engines/"),
        ("engines.0.file", "engines/absent.plan", "engines 'engines/absent.plan' is not among the files"),
        ("engines.0.file", "engines/../model.onnx", "engines[0].file 'engines/../model.onnx' leads out"),
        ("engines.0.plugin", [], "engines[0].plugin must be an object, not a list"),
        ("engines", [example_json()["engines"][0]] * 2, "engines has a file twice"),
        ("verification.status", "failed", "verification.status must be passed or skipped"),
        ("verification.cases", [1], "verification.cases[0] must be an object, not 1"),
    ],
)
def test_a_wrong_value_is_refused_by_its_place(path: str, value: Any, message: str) -> None:
    assert message in refusal(changed(path, value))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../model.onnx", "leads out of its folder by '..'"),
        ("a/../../b", "leads out of its folder by '..'"),
        ("..", "leads out of its folder by '..'"),
        ("/etc/passwd", "is an absolute path"),
        ("C:/model.onnx", "is an absolute path"),
        ("~/model.onnx", "is an absolute path"),
        ("a\\b", "has a backslash"),
        ("a//b", "has an empty part"),
        ("a/", "has an empty part"),
        ("", "files must be non-empty text"),
        (".", "is no file name of a bundle"),
        ("a/./b", "is no file name of a bundle"),
        (".hidden", "is no file name of a bundle"),
        ("-rf", "is no file name of a bundle"),
        ("a b", "is no file name of a bundle"),
        ("a\n", "files must be non-empty text without control characters"),
        ("a\0b", "files must be non-empty text without control characters"),
        ("é.onnx", "is no file name of a bundle"),
        ("manifest.json", "cannot be the manifest itself"),
    ],
)
def test_a_file_name_that_could_lead_elsewhere_is_refused(name: str, message: str) -> None:
    values = example_json()
    values["files"][name] = {"size": 1, "sha256": "0" * 64}
    assert message in refusal(json.dumps(values))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"size": -1, "sha256": "0" * 64}, "size must not be negative"),
        ({"size": 1.0, "sha256": "0" * 64}, "size must be int"),
        ({"size": 1, "sha256": "0" * 63}, "sha256 must be 64 lower-case hex digits"),
        ({"size": 1, "sha256": "0" * 64 + "\n"}, "control characters"),
        ({"size": 1}, "sha256 is missing"),
    ],
)
def test_a_file_entry_must_hold_a_size_and_a_digest(entry: dict[str, Any], message: str) -> None:
    values = example_json()
    values["files"]["model.onnx"] = entry
    text = refusal(json.dumps(values))
    assert message in text
    assert "files['model.onnx']" in text


def test_a_message_stays_one_short_line_for_a_long_value() -> None:
    assert len(refusal(changed("precision", ["x" * 10_000]))) < 300
    assert len(refusal(changed("checkpoint.licence", "x" * 10_000 + "\n"))) < 300


@pytest.mark.parametrize(
    ("headroom", "message"),
    [
        ({"a": math.nan}, "not finite"),
        ({"a": math.inf}, "not finite"),
        ({"a": np.float32(1)}, "cannot hold a float32"),
        ({1: 1.0}, "a key that is not a string"),
        ({"a": 2**64}, "beyond 64 bits"),
        ({"a": "\ud800"}, "not Unicode text"),
    ],
)
def test_what_no_reader_accepts_is_not_written(headroom: dict[Any, Any], message: str) -> None:
    verification = dataclasses.replace(example_manifest().verification, headroom=headroom)
    files = {"model.onnx": FileEntry(1, "0" * 64)}
    with pytest.raises(BundleError, match=message):
        dataclasses.replace(example_manifest(), verification=verification, files=files).to_json()


def test_a_value_that_holds_itself_is_not_written() -> None:
    headroom: dict[str, Any] = {}
    headroom["self"] = headroom
    with pytest.raises(BundleError, match="nested more than"):
        dataclasses.replace(example_manifest(), verification=Verification("passed", headroom=headroom)).to_json()


def test_a_manifest_without_its_model_file_is_not_written() -> None:
    with pytest.raises(BundleError, match=r"'model\.onnx' is not among the files"):
        example_manifest().to_json()


_LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_VALUE = st.recursive(
    _LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def accepts_or_refuses(text: str) -> None:
    """Only BundleError may escape, and what is accepted can be written and read again."""
    try:
        manifest = Manifest.from_json(text)
    except BundleError:
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_manifest_with_any_value_replaced_is_read_or_refused(data: st.DataObject) -> None:
    values = example_json()
    inner: Any = values
    for _ in range(data.draw(st.integers(0, 4))):
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        deeper = [key for key in keys if isinstance(inner[key], (dict, list)) and inner[key]]
        if not deeper:
            break
        inner = inner[data.draw(st.sampled_from(deeper))]
    key = data.draw(st.sampled_from(list(inner) if isinstance(inner, dict) else list(range(len(inner)))))
    if data.draw(st.booleans()):
        inner[key] = data.draw(_VALUE)
    else:
        del inner[key]
    if isinstance(inner, dict) and data.draw(st.booleans()):
        inner[data.draw(st.text(max_size=8))] = data.draw(_VALUE)
    accepts_or_refuses(json.dumps(values))


_EXAMPLE_TEXT = json.dumps(example_json(), indent=1)


@settings(max_examples=200, deadline=None)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(_EXAMPLE_TEXT)),
            st.integers(0, 20),
            st.text(max_size=5)
            | st.sampled_from(['"', "{", "}", "[", "]", ",", ":", "\\u0000", "\\ud800", "1e999", "-"]),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_a_manifest_with_any_text_spoiled_is_read_or_refused(edits: list[tuple[int, int, str]]) -> None:
    text = _EXAMPLE_TEXT
    for start, length, insert in edits:
        text = text[:start] + insert + text[start + length :]
    accepts_or_refuses(text)


@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        ((1, 2, 28, 42), True),
        ((2, 2, 28, 42), False),
        ((1, 5, 28, 42), False),
        ((1, 4, 28, 700), True),
        ((1, 2, 35, 42), False),
        ((1, 2, 14, 42), False),
    ],
)
def test_a_file_takes_what_its_ranges_say(shape: tuple[int, int, int, int], taken: bool) -> None:
    ranges = ShapeRanges(Range(1, 1), Range(1, 4), Range(28, 56, 14), Range(14, None, 14))
    assert ranges.takes(shape) == taken
