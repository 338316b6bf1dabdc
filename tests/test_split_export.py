"""A model in two files: what each has, that together they compute what one file does, and who refuses what."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import pytest
import splits
import torch
import variants
from exports import MOE, initializers
from numpy.typing import NDArray

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.errors import BundleError, ExportError, InputError
from moe3d_deploy.export import graph, verify
from moe3d_deploy.export.contract import DEFAULT_OUTPUTS, OPTIONAL_OUTPUTS
from moe3d_deploy.export.parts import layers_of, parts_of
from moe3d_deploy.export.pipeline import ExportOptions
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.static import StaticShape
from moe3d_deploy.files import sha256_file
from moe3d_deploy.manifest import Tensor
from moe3d_deploy.runtime.onnx_operators import DOMAIN as ATTENTION_DOMAIN
from moe3d_deploy.runtime.onnx_operators import NAME as ATTENTION
from moe3d_deploy.runtime.session import Session

BUNDLES = {"heads": splits.heads, "encoder": splits.encoder}
IN_EACH = pytest.mark.parametrize("split", BUNDLES)

# Of one file against two in float32: the same operators on the same values, but the runtime may fuse them otherwise at
# the border. Not one bit differed where this was measured (x86-64, ONNX Runtime 1.31).
ROUNDING = 1e-6


@functools.cache
def session(split: str) -> Session:
    return Session.open(BUNDLES[split]().path)


def difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """max |a - b| / max |b|."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


def dims(value: onnx.ValueInfoProto) -> tuple[str | int, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


# ---- the files


@IN_EACH
def test_the_files_take_and_give_what_the_manifest_says(split: str) -> None:
    bundle = BUNDLES[split]()
    manifest = Bundle.open(bundle.path).manifest
    assert (manifest.format_version, manifest.split) == (2, split)
    assert set(manifest.files) == {name + end for name in manifest.model_files for end in ("", ".data")}
    assert [output.name for output in manifest.outputs] == list(session(split).output_names)
    for part in manifest.parts:
        proto = onnx.load(bundle.path / part.file, load_external_data=False)
        for values, tensors in ((proto.graph.input, part.inputs), (proto.graph.output, part.outputs)):
            assert [(value.name, dims(value)) for value in values] == [(t.name, t.shape) for t in tensors]
        notes = {entry.key: entry.value for entry in proto.metadata_props}
        assert notes["moe3d.part"] == part.role
        assert set(json.loads(notes["moe3d.tensors"])) == {t.name for t in (*part.inputs, *part.outputs)}


def test_what_flows_between_the_parts() -> None:
    """Only the layers that the heads read, patches alone; cameras where world points are made of them."""
    aggregator, heads = splits.heads().manifest.parts
    tokens = ("tokens_0", ("B", "S", "rows", "columns", 64))
    cameras = [("extrinsics", ("B", "S", 3, 4)), ("intrinsics", ("B", "S", 3, 3))]
    assert layers_of(MOE) == (0,)
    assert [(t.name, t.shape) for t in heads.inputs] == [tokens, *cameras]
    assert [(t.name, t.shape) for t in aggregator.outputs] == [tokens, *cameras, ("pose_enc", ("B", "S", 9))]
    without = parts_of("heads", MOE, (), "float32", StaticShape())
    assert [t.name for t in without[1].inputs] == ["tokens_0"]
    encoder, decoder = splits.encoder().manifest.parts
    tokens = ("patch_tokens", ("B", "S", "rows", "columns", 32))
    assert [(t.name, t.shape) for t in encoder.outputs] == [(t.name, t.shape) for t in decoder.inputs] == [tokens]


@IN_EACH
def test_no_weight_is_in_both_files_and_none_is_lost(split: str) -> None:
    single = initializers(splits.single(split))
    bundle = BUNDLES[split]()
    found: dict[str, NDArray[Any]] = {}
    for file in bundle.manifest.model_files:
        for tensor in onnx.load(bundle.path / file).graph.initializer:
            if "." in tensor.name:  # a parameter by its path; the others are small constants of the exporter
                assert tensor.name not in found
                found[tensor.name] = onnx.numpy_helper.to_array(tensor)
    weights = {name: value for name, value in single.items() if "." in name}
    assert len(weights) > 50
    assert set(found) == set(weights)
    assert all(np.array_equal(found[name], value) for name, value in weights.items())
    sizes = {name: entry.size for name, entry in bundle.manifest.files.items() if name.endswith(".data")}
    assert sum(sizes.values()) <= splits.single(split).path.with_suffix(".onnx.data").stat().st_size


@IN_EACH
def test_the_expert_mix_is_in_the_file_that_computes_it(split: str) -> None:
    bundle = BUNDLES[split]()
    first, second = (onnx.load(bundle.path / file, load_external_data=False) for file in bundle.manifest.model_files)
    attention = [] if split == "heads" else [ATTENTION]
    assert [function.name for function in first.functions] == [ATTENTION]
    assert [function.name for function in second.functions] == [*attention, "ExpertMix"]
    assert {entry.domain for entry in first.opset_import} == {"", ATTENTION_DOMAIN}


@pytest.mark.full
def test_the_files_are_the_same_bytes_again() -> None:
    again = variants.export_here(splits.HEADS)
    assert again.manifest.files == splits.heads().manifest.files


# ---- what they compute


@IN_EACH
@pytest.mark.parametrize("shape", splits.SHAPES)
def test_two_files_compute_what_one_does(split: str, shape: tuple[int, int, int, int]) -> None:
    images = verify.images_for(shape, MOE.patch_size)
    expected = splits.single(split).in_the_runtime(images)
    found = session(split).run(images)
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert difference(found[name], values) <= ROUNDING, name


@IN_EACH
def test_any_number_of_views_at_a_time_gives_the_same(split: str) -> None:
    """Two scenes of 5 views: chunks that hold views of both, a last one that is smaller, and all at once."""
    images = verify.images_for((2, 5, 2, 3), MOE.patch_size)
    expected = session(split).run(images)
    for chunk in (2, 3, 10, 99):
        found = Session.open(BUNDLES[split]().path, view_chunk=chunk).run(images)
        for name, values in expected.items():
            assert difference(found[name], values) <= ROUNDING, (chunk, name)


@IN_EACH
def test_the_parts_were_verified_together(split: str) -> None:
    verification = BUNDLES[split]().manifest.verification
    assert verification.status == "passed"
    assert [tuple(case["shape_in_patches"]) for case in verification.cases] == list(splits.SHAPES)
    for case in verification.cases:
        assert set(case["errors"]["executed"]) == {output.name for output in BUNDLES[split]().manifest.outputs}


def test_a_part_that_computes_something_else_fails_the_verification(tmp_path: Path) -> None:
    """A weight of the heads that is another one in the file."""
    bundle = variants.copy(splits.heads(), tmp_path)
    path = bundle.part_paths["heads"]
    proto = onnx.load(path)
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name.endswith("expert_bias"))
    changed = onnx.numpy_helper.to_array(weight) + np.float32(0.1)
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    onnx.save(proto, path)
    names = [output.name for output in bundle.manifest.outputs]
    request = {
        "source": {"source": str(exports.checkpoint())}, "policy": {"precision": "fp32"}, "input": "float32",
        "outputs": [name for name in names if name in OPTIONAL_OUTPUTS], "names": names, "shapes": [[1, 2, 2, 3]],
        "patch_size": MOE.patch_size, "folder": str(tmp_path),
        "model": {role: str(file) for role, file in bundle.part_paths.items()},
    }  # fmt: skip
    verify.reference(request, lambda event: None)
    verify.executed(request, lambda event: None)
    with pytest.raises(ExportError, match="^verification failed: ONNX Runtime at B=1 S=2, 2x3 patches: depth is off"):
        verify.check(tmp_path, [(1, 2, 2, 3)], names, ["executed"], "fp32")


@pytest.mark.full
@pytest.mark.parametrize("split", ["heads", "encoder"])
def test_every_variant_can_be_split(split: str) -> None:
    """bf16, attention as an operator, 8-bit pixels, fixed axes, every output: verified by the twins of both files."""
    options = dataclasses.replace(
        variants.BRAIN, outputs=OPTIONAL_OUTPUTS, static=StaticShape(1, 3, 28, 42), split=split, shapes=((1, 3, 2, 3),)
    )
    manifest = variants.export_here(options).manifest
    assert set(manifest.verification.cases[0]["errors"]["twin"]) == {*DEFAULT_OUTPUTS, *OPTIONAL_OUTPUTS}
    for part in manifest.parts:
        assert part.inputs[0].shape[:2] == (("B", "S") if part.per_view else (1, 3))
    assert manifest.parts[0].inputs[0].dtype == "uint8"


# ---- refused


def test_a_part_that_depends_on_a_concrete_shape_is_refused() -> None:
    """The gate reads the sizes of tokens as it does those of images."""

    class Module(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens * (1.0 if tokens.shape[2] <= tokens.shape[3] else 1.5)

    tokens = Tensor("patch_tokens", "float32", ("B", "S", "rows", "columns", 4), "tokens")
    with pytest.raises(ExportError) as caught:
        graph.trace(Module(), 14, (tokens,))
    assert str(caught.value).endswith("it takes for granted that H/14 <= W/14, which fails at B=3 S=5 H=70 W=56")


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        ExportOptions(PrecisionPolicy("fp32"), split="tail")
    assert str(caught.value) == "split 'tail' is unknown; choose from heads, encoder"


@pytest.mark.parametrize("name", ["model.aggregator.onnx", "model.heads.onnx", "model.heads.onnx.data"])
def test_damage_to_any_file_is_found(name: str, tmp_path: Path) -> None:
    bundle = variants.copy(splits.heads(), tmp_path)
    data = bytearray((bundle.path / name).read_bytes())
    data[-1] ^= 1
    (bundle.path / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name} is damaged: its SHA-256 is not the manifest's"):
        Session.open(bundle.path)
    (bundle.path / name).unlink()
    with pytest.raises(BundleError, match=rf"{name} is missing"):
        Bundle.open(bundle.path, verify="sizes")


def test_weights_of_the_second_part_may_not_lie_elsewhere(tmp_path: Path) -> None:
    bundle = variants.copy(splits.heads(), tmp_path)
    path = bundle.part_paths["heads"]
    path.write_bytes(path.read_bytes().replace(b"model.heads.onnx.data", b"../el.heads.onnx.data"))
    manifest: Any = json.loads((bundle.path / "manifest.json").read_text())
    manifest["files"][path.name]["sha256"] = sha256_file(path)
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"model\.heads\.onnx has weights in '\.\./el\.heads\.onnx\.data', which"):
        Bundle.open(bundle.path)


def test_a_split_bundle_without_its_manifest_is_said_to_be_none(tmp_path: Path) -> None:
    bundle = variants.copy(splits.encoder(), tmp_path)
    (bundle.path / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"has no manifest\.json, so it is not a bundle"):
        Session.open(bundle.path)


def test_fixed_axes_hold_for_the_part_that_sees_all_views() -> None:
    static = StaticShape(1, 4, 28, 42)
    aggregator, heads = parts_of("heads", MOE, ("world_points",), "float32", static)
    assert [t.shape for t in aggregator.inputs] == [(1, 4, 3, 28, 42)]
    assert aggregator.outputs[0].shape == (1, 4, 2, 3, 64)
    assert [t.shape for t in heads.inputs] == [("B", "S", 2, 3, 64), ("B", "S", 3, 4), ("B", "S", 3, 3)]
    assert heads.outputs[0].shape == ("B", "S", 28, 42)
    encoder, decoder = parts_of("encoder", MOE, (), "uint8", static)
    assert encoder.inputs[0].shape == ("B", "S", 28, 42, 3)
    assert decoder.inputs[0].shape == (1, 4, 2, 3, 32)


def test_one_file_has_no_parts() -> None:
    assert parts_of(None, MOE, (), "float32", StaticShape()) == ()
