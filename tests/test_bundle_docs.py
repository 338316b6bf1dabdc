"""docs/bundle.md names exactly the keys that an exported bundle and a built engine have."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exports
import pytest

from moe3d_deploy import trt
from moe3d_deploy.child import ChildResult
from moe3d_deploy.engines import build as engine_build
from moe3d_deploy.engines.shapes import ShapeProfile

PAGE = Path(__file__).parent.parent / "docs" / "bundle.md"
TEXT = PAGE.read_text(encoding="utf-8")


def documented(heading: str) -> dict[str, str]:
    """The keys of the first table after a line that begins with `heading`, with their rows."""
    _, found, rest = TEXT.partition(f"\n{heading}")
    assert found, heading
    table = re.search(r"^\| key \|.*\n\|---.*\n((?:\|.*\n)+)", rest, re.MULTILINE)
    assert table, heading
    return {key: row for row in table[1].splitlines() for key in re.findall(r"`(\w+)`", row.split("|")[1])}


def named_in(row: str) -> set[str]:
    """The keys that the last cell of a row lists as code."""
    return set(re.findall(r"`(\w+)`", row.split("|")[3]))


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    """Of the default export of a checkpoint folder."""
    values: dict[str, Any] = json.loads((exports.bundle().path / "manifest.json").read_text(encoding="utf-8"))
    return values


@pytest.mark.parametrize(
    ("heading", "path"),
    [
        ("## Manifest", ()),
        ("`checkpoint`", ("checkpoint",)),
        ("`preprocessing`:", ("preprocessing",)),
        ("A tensor", ("outputs", 0)),
        ("`verification`:", ("verification",)),
    ],
)
def test_the_tables_have_the_keys_of_an_exported_bundle(
    heading: str, path: tuple[str | int, ...], manifest: dict[str, Any]
) -> None:
    values: Any = manifest
    for key in path:
        values = values[key]
    rows = documented(heading)
    assert {key for key in rows if "may be absent" not in rows[key]} <= set(values) <= set(rows)


def test_the_inner_keys_of_the_verification_are_documented(manifest: dict[str, Any]) -> None:
    rows, verification = documented("`verification`:"), manifest["verification"]
    case = verification["cases"][0]
    assert set(case) | set(case["errors"]) == named_in(rows["cases"]) - {"twin"}  # of bf16 files alone
    assert set(verification["headroom"]) == named_in(rows["headroom"])


def test_the_range_has_the_documented_keys(manifest: dict[str, Any]) -> None:
    (line,) = [line for line in TEXT.splitlines() if line.startswith("A range: ")]
    assert set(re.findall(r"`(\w+)` \(", line)) == set(manifest["shape_ranges"]["height"])
    assert set(manifest["shape_ranges"]) <= set(re.findall(r"`(\w+)`", documented("## Manifest")["shape_ranges"]))


@dataclass
class Facts:
    plugins: tuple[str, ...] = ("expert_mix",)


def test_the_table_has_the_keys_of_a_built_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`build` and its child do everything but build."""

    def build_engine(*_: Any, builder: str, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(
            builder=builder, builder_version="1.6.1", compute_capabilities=((8, 9),), facts=Facts(), listing="",
            activation_memory_bytes=(1,), parse_seconds=1.0, build_seconds=2.0, plan_bytes=3, attentions=(),
        )  # fmt: skip

    def run(function: str, request: dict[str, Any], **_: Any) -> ChildResult:
        return ChildResult(engine_build.build_in_child(request, lambda event: None), 4.0, 5)

    monkeypatch.setattr(trt, "build_engine", build_engine)
    monkeypatch.setattr(engine_build, "run_in_child", run)
    monkeypatch.setattr(engine_build, "resolve_builder", lambda builder, **file: builder)
    monkeypatch.setattr(engine_build, "signal", SimpleNamespace(signal=lambda *_: None, SIGINT=2, SIG_DFL=0))
    profile = ShapeProfile.from_ranges("1", "1:2:4", "28", "42", 14)
    model = exports.bundle().path / "model.onnx"
    record = engine_build.build(model, tmp_path / "plan", profile, precision="fp16", builder="tensorrt-rtx")

    rows = documented("An engine record")
    assert set(rows) == {"file", "part", *record}
    assert named_in(rows["build"]) == set(record["build"])
    assert named_in(rows["plugin"]) == set(record["plugin"])


def test_a_seeded_bundle_has_the_digest_that_the_page_describes() -> None:
    """Not null: of the text that determines the weights."""
    import hashlib

    from moe3d_deploy.checkpoint import open_checkpoint

    quoted = re.search(r"`(preset moe3d-1b seed 0 generator v\d+)`", documented("`checkpoint`")["sha256"])
    assert quoted
    assert open_checkpoint("moe3d-1b").sha256() == hashlib.sha256(quoted[1].encode()).hexdigest()


@pytest.mark.parametrize("page", [PAGE, PAGE.parent.parent / "SECURITY.md"])
def test_the_pages_do_not_promise_what_is_not_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "video" not in text
    assert "links that lead outside" not in text
