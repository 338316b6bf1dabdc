"""`moe3d plan` of a model in two files: a bundle's own split, or the one that is asked for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundles
import pytest
from manifests import example_manifest
from test_cli_plan import run, text

from moe3d_deploy.bundle import BundleWriter
from moe3d_deploy.config import PRESETS
from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.export.parts import parts_of
from moe3d_deploy.export.static import StaticShape
from moe3d_deploy.manifest import FORMAT_VERSION
from moe3d_deploy.memory import activation_bytes
from moe3d_deploy.memory_split import split_activation_bytes, split_memory

TINY = replace(PRESETS["moe3d-tiny"], point_head=False)
SHAPE = (1, 16, 252, 252)


def shape_of(*args: object) -> dict[str, Any]:
    (found,) = json.loads(text(*args, "--shapes", "1x16x252x252", "--json"))["shapes"]
    return dict(found)


def refusal(*args: object) -> str:
    error = run(*args).exception
    assert isinstance(error, Moe3dError), error
    return str(error)


def split_bundle(path: Path, split: str, precision: str = "fp16") -> Path:
    """A bundle whose files hold nothing, of moe3d-tiny."""
    parts = parts_of(split, TINY, (), "float32", StaticShape(None, None, None, None))
    changes = {
        "name": "tiny",
        "model_config": TINY.to_dict(),
        "precision": precision,
        "merged_experts": True,
        "parts": parts,
        "model_file": parts[0].file,
        "format_version": FORMAT_VERSION,
        "inputs": parts[0].inputs,
        "files": {},
    }
    with BundleWriter(path) as writer:
        for part in parts:
            (writer.folder / part.file).write_bytes(bundles.OLD)
        writer.commit(replace(example_manifest(), **changes))
    return path


def peak(split: str, chunk: int | None, form: str = "fused", precision: str = "fp16") -> int:
    return split_activation_bytes(TINY, SHAPE, split, form=form, precision=precision, view_chunk=chunk)


def test_a_split_bundle_is_planned_as_its_parts_run(tmp_path: Path) -> None:
    """Engines: the heads on 8 views at a time; the encoder on all."""
    heads, encoder = (split_bundle(tmp_path / split, split) for split in ("heads", "encoder"))
    found = shape_of(heads)
    assert found["activation_bytes"] == peak("heads", 8)
    assert found["activation_bytes"] < activation_bytes(TINY, SHAPE, form="fused", precision="fp16")
    parts = split_memory(TINY, SHAPE, "heads", form="fused", precision="fp16", view_chunk=8)
    assert [(part["role"], part["shape"], part["activation_bytes"]) for part in found["parts"]] == [
        (part.role, list(part.shape), part.activation_bytes) for part in parts
    ]
    assert shape_of(encoder)["activation_bytes"] == peak("encoder", None)


def test_the_chunk_that_is_asked_for_is_planned_and_built(tmp_path: Path) -> None:
    bundle = split_bundle(tmp_path / "b", "heads")
    assert shape_of(bundle, "--view-chunk", 2)["activation_bytes"] == peak("heads", 2)
    assert "--view-chunk 2" in text(bundle, "--view-chunk", 2).splitlines()[-1]
    assert "--view-chunk" not in text(bundle).splitlines()[-1]  # 8 is the engine's own


def test_on_a_cpu_the_run_has_the_chunk(tmp_path: Path) -> None:
    bundle = split_bundle(tmp_path / "b", "heads", "fp32")
    form = json.loads(text(bundle, "--device", "cpu", "--json"))["form"]
    for flags, chunk in (((), 1), (("--view-chunk", "3"), 3)):
        found = shape_of(bundle, "--device", "cpu", *flags)
        assert found["activation_bytes"] == peak("heads", chunk, form, "fp32")
    shown = text(bundle, "--device", "cpu", "--view-chunk", 3)
    assert shown.splitlines()[-1] == f"next         moe3d run {bundle} IMAGES... -o out --view-chunk 3"
    assert text(bundle, "--device", "cpu").splitlines()[-1].endswith("-o out")


def test_a_preset_is_planned_split_where_it_is_asked_for() -> None:
    assert shape_of("moe3d-tiny", "--split", "heads")["activation_bytes"] == peak("heads", 8)
    shown = text("moe3d-tiny", "--split", "heads", "--shapes", "1x16x252x252")
    assert "\nsplit        aggregator then heads: two files, both loaded, one after the other\n" in shown
    assert "built for shapes up to this one, heads on 8 views at a time\n" in shown
    assert "\n1x16x252x252: aggregator " in shown
    assert "of tokens between them, in both" in shown
    last = shown.splitlines()[-1]
    assert last.endswith(
        "moe3d-export moe3d-tiny -o bundle --precision fp16 --split heads --views 16 --height 252 --width 252"
    )


def test_one_file_has_no_parts() -> None:
    assert shape_of("moe3d-tiny")["parts"] == []


def test_limits_are_those_of_the_parts() -> None:
    """60 views of 518x518: one convolution of all views crosses 2^31 values, of 8 views none does."""
    shapes = ("--shapes", "1x60x518x518")
    assert "a convolution has" in text("moe3d-1b", *shapes)
    assert "a convolution has" not in text("moe3d-1b", "--split", "heads", *shapes)
    assert "a convolution has" in text("moe3d-1b", "--split", "heads", "--view-chunk", 60, *shapes)
    assert "global attention has" in text("moe3d-1b", "--split", "heads", *shapes)


def test_smaller_chunks_are_offered_where_a_run_does_not_fit() -> None:
    """A device that holds 4 views of the heads at a time beside the weights."""
    weights = json.loads(text("moe3d-tiny", "--split", "heads", "--json"))["weight_bytes"]
    device = f"1e12,1e10,{weights + peak('heads', 4)}"
    (change,) = [
        change
        for change in shape_of("moe3d-tiny", "--split", "heads", "--device", device)["changes_that_fit"]
        if change["kind"] == "view_chunk"
    ]
    assert change["view_chunk"] == 4


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("moe3d-tiny", "--split", "heads", "--form", "eager"), "a split model does not run in PyTorch: leave form"),
        (("moe3d-tiny", "--view-chunk", "3"), "views in chunks exist in PyTorch and in a split model only: take form"),
    ],
)
def test_what_is_not_run_is_refused(args: tuple[str, ...], line: str) -> None:
    assert refusal(*args).startswith(line)


def test_a_bundle_is_split_as_it_is(tmp_path: Path) -> None:
    bundle = split_bundle(tmp_path / "b", "heads")
    assert run(bundle, "--split", "heads").exit_code == 0
    assert refusal(bundle, "--split", "encoder") == (
        f"bundle {bundle} is split at its heads; leave --split out, or plan its checkpoint"
    )
