"""Bundles whose model is split, each made once per run, and the single file that each is compared with."""

import functools

import exports
import variants
from exports import EXPERT_OUTPUTS, Exported

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.export.pipeline import ExportOptions
from moe3d_deploy.export.precision import PrecisionPolicy

OUTPUTS = (*EXPERT_OUTPUTS, "world_points", "pose_enc")
# Two scenes, odd views and sides, more views than a chunk; as verify.SHAPES_IN_PATCHES, but fewer.
SHAPES = ((1, 1, 1, 1), (2, 2, 3, 6), (1, 5, 5, 3))

HEADS = ExportOptions(PrecisionPolicy("fp32"), outputs=OUTPUTS, split="heads", shapes=SHAPES)
ENCODER = ExportOptions(PrecisionPolicy("fp16"), split="encoder", shapes=SHAPES)


@functools.cache
def heads() -> Bundle:
    """float32, merged experts, every output but the point head's: what `exports.merged` has in one file."""
    return variants.export_here(HEADS)


@functools.cache
def encoder() -> Bundle:
    """fp16, the default outputs: what `exports.bundle` has in one file."""
    return variants.export_here(ENCODER)


@functools.cache
def plain_heads() -> Bundle:
    """fp16, the default outputs, split at the heads."""
    return variants.export_here(ExportOptions(PrecisionPolicy("fp16"), split="heads", shapes=((1, 1, 1, 1),)))


def single(split: str) -> Exported:
    """The same model in one file."""
    return exports.merged() if split == "heads" else exports.bundle().exported
