"""What `moe3d plan` predicts for an engine beside what its builder says of it: memory per profile, size of the file."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from moe3d_deploy import costs, planning
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.manifest import WITH_HEADS, Manifest, Profile
from moe3d_deploy.memory import activation_bytes as predicted_activation_bytes
from moe3d_deploy.parameter_shapes import parameter_shapes

TOLERANCE = 0.15  # docs/costs.md: what predictions are held to
COMPARED_FROM_BYTES = 256_000_000  # and from which size on

_OF_POINT_HEAD = ("point_map", "point_map_conf")


def plan_beside_build(
    manifest: Manifest,
    profiles: Sequence[Profile],
    *,
    activation_bytes: Sequence[int],
    plan_bytes: int,
    part: str | None = None,
) -> dict[str, Any]:
    """A JSON-able dict for the engine's record, of the largest shape of each profile.

    activation_bytes   what the builder says each profile takes; a list of another length is not told apart: found null
    plan_bytes         size of the engine's file
    part               of a split model: its own work, weights and activations

    `form` of the attention, `weight_bytes`, `plan_bytes` and, per profile, `shape` (B, S, H, W), `flops` and
    `activation_bytes`; what is compared has `predicted` and `found`. `notes` has a line for each that differs by more
    than TOLERANCE of what was found, from COMPARED_FROM_BYTES on, and for what the prediction leaves out.
    Raises InputError for a precision that is no policy.
    """
    type_of = PrecisionPolicy(manifest.precision).type_of
    held = has_point_head(manifest)
    config = dataclasses.replace(manifest.config, point_head=held)
    form, merged = planning.usual_form(type_of, None), manifest.merged_experts
    setup = planning.Setup(config, manifest.precision, type_of, form, merged=merged)
    told: list[int | None] = (
        list(activation_bytes) if len(activation_bytes) == len(profiles) else [None] * len(profiles)
    )
    rows = []
    if part:
        return _plan_of_part(setup, profiles, told, plan_bytes, part)
    for profile, found in zip(profiles, told, strict=True):
        plan = planning.plan(setup, profile.max)
        memory = {"predicted": plan.activation_bytes, "found": found}
        rows.append({"shape": list(profile.max), "flops": plan.flops, "activation_bytes": memory})
    size = {"predicted": setup.weight_bytes, "found": plan_bytes}
    notes = [*_differences(rows, size), *_left_out(setup)]
    return {
        "form": form, "weight_bytes": setup.weight_bytes, "plan_bytes": size, "profiles": rows, "notes": notes,
    }  # fmt: skip


def _plan_of_part(
    setup: planning.Setup, profiles: Sequence[Profile], told: Sequence[int | None], plan_bytes: int, part: str
) -> dict[str, Any]:
    rows = []
    for profile, found in zip(profiles, told, strict=True):
        flops = sum(item.flops for item in costs.work(setup.config, profile.max) if _is_of(part, item.parameter))
        predicted = predicted_activation_bytes(
            setup.config, profile.max, form=setup.form, precision=setup.precision, part=part
        )
        memory = {"predicted": predicted, "found": found}
        rows.append({"shape": list(profile.max), "flops": flops, "activation_bytes": memory})
    shapes = parameter_shapes(setup.config)
    weights = sum(
        math.prod(shape) * costs.BYTES[setup.type_of(name)] for name, shape in shapes.items() if _is_of(part, name)
    )
    size = {"predicted": weights, "found": plan_bytes}
    notes = [*_differences(rows, size), *(_left_out(setup) if part in WITH_HEADS else ())]
    return {"form": setup.form, "weight_bytes": weights, "plan_bytes": size, "profiles": rows, "notes": notes}


def _left_out(setup: planning.Setup) -> Iterator[str]:
    """What the prediction of activations does not have of this file."""
    if setup.config.point_head:
        yield "activations are predicted without the point head"
    if setup.config.moe and not setup.merged:
        yield "activations are predicted for merged experts; this file keeps a convolution for each"


def _is_of(part: str, parameter: str) -> bool:
    """Whether a part of a split model has this parameter."""
    if part in ("encoder", "decoder"):
        return parameter.startswith("aggregator.patch_embed.") == (part == "encoder")
    return parameter.startswith(("depth_head.", "point_head.")) == (part == "heads")


def has_point_head(manifest: Manifest) -> bool:
    """Whether the file computes VGGT's point head: exports have it where an output asks for it."""
    return any(tensor.name in _OF_POINT_HEAD for tensor in manifest.outputs)


def _differences(rows: Sequence[dict[str, Any]], size: dict[str, int]) -> Iterator[str]:
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        yield from _difference(f"activation memory at {shape}", **row["activation_bytes"])
    yield from _difference("the engine's size", **size)


def _difference(what: str, predicted: int, found: int | None) -> Iterator[str]:
    if found and found >= COMPARED_FROM_BYTES and abs(predicted - found) > TOLERANCE * found:
        yield (
            f"{what}: {found / 1e6:.0f} MB where {predicted / 1e6:.0f} MB are predicted, "
            f"more than {TOLERANCE:.0%} apart".replace("%", " %")
        )
