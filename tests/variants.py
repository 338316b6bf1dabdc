"""Bundles of the export's variants, each made once per run. Every one has several, for tracing takes long."""

import functools
import importlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import exports
from exports import Exported

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.child import ChildResult
from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.export import pipeline
from moe3d_deploy.export.contract import OPTIONAL_OUTPUTS
from moe3d_deploy.export.pipeline import ExportOptions, export_bundle
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.export.static import StaticShape

BRAIN = ExportOptions(PrecisionPolicy("bf16"), input="uint8", opset=23, static=StaticShape(1, None, 28, 42))
PIXELS = ExportOptions(PrecisionPolicy("fp32"), input="uint8", outputs=OPTIONAL_OUTPUTS)
OPERATOR = ExportOptions(
    PrecisionPolicy("fp16"), opset=23, outputs=OPTIONAL_OUTPUTS, static=StaticShape(None, 2, None, None)
)


@functools.cache
def brain() -> Bundle:
    """bf16, 8-bit pixels, attention as an operator, all fixed but the views; by processes, as the command does it."""
    return export_bundle(SourceSpec(str(exports.checkpoint())), exports.new_folder("brain") / "small", BRAIN).bundle


@functools.cache
def pixels() -> Bundle:
    """float32, 8-bit pixels, every output."""
    return export_here(PIXELS)


@functools.cache
def operator() -> Bundle:
    """fp16, attention as an operator, every output, two views."""
    return export_here(OPERATOR)


def export_here(options: ExportOptions) -> Bundle:
    """An export whose stages run in this process, where torch is loaded and warm."""
    with stages_here():
        path = exports.new_folder("variant") / "small"
        return export_bundle(SourceSpec(str(exports.checkpoint())), path, options).bundle


@contextmanager
def stages_here() -> Iterator[None]:
    def run(
        function: str, request: dict[str, Any], *, title: str, on_event: Any, failure: type[Moe3dError]
    ) -> ChildResult:
        module, _, name = function.partition(":")
        return ChildResult(getattr(importlib.import_module(module), name)(request, on_event), 0.1, 1)

    with mock.patch.object(pipeline, "run_in_child", run):
        yield


def exported(bundle: Bundle, outputs: Sequence[str] = ()) -> Exported:
    return Exported(bundle.model_path, exports.load(outputs=outputs))


def copy(bundle: Bundle, folder: Path) -> Bundle:
    return Bundle.open(shutil.copytree(bundle.path, folder / "small"))
