"""What the engine tests share besides their fixtures (engine_fixtures.py)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe3d_deploy import trt
from moe3d_deploy.engines import build as engine_build
from moe3d_deploy.engines.shapes import ShapeProfile

PROFILE = ShapeProfile.from_ranges(views="1:2:12", height="56:56:112", width="56")
Write = Callable[..., Path]
Build = Callable[..., trt.BuiltEngine]


def build_in_child(path: Path, out: Path, **options: Any) -> dict[str, Any]:
    return engine_build.build(path, out, PROFILE, precision="fp16", builder="tensorrt-rtx", **options)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def children(parent: int) -> list[int]:
    """Process ids whose parent is `parent`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found
