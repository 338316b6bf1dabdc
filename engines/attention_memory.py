"""Is the attention fused? Told from the activation memory that a builder reports, without running anything.

With its weights in memory attention takes the square of the tokens, fused it does not: `memory` predicts both forms of
the same engine, and what the builder says is one of them, neither, or too little to tell.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from moe3d_deploy import costs
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.costs import Shape4
from moe3d_deploy.engines.planned import COMPARED_FROM_BYTES, TOLERANCE, has_point_head
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.manifest import WITH_HEADS, Manifest, Profile
from moe3d_deploy.memory import activation_bytes
from moe3d_deploy.planning import GLOBAL_ATTENTION

Told = Literal["fused", "in memory", "not told"]


@dataclasses.dataclass(frozen=True)
class Forms:
    """Predicted activation memory of one engine at one shape, in bytes.

    fused       no attention's weights are in memory
    in_memory   those of every attention are, before and after the softmax
    one_map     the weights of one global attention, (heads, S T, S T) for each scene; of an encoder by itself those of
                one of its attentions, (heads, T, T) for each view
    """

    fused: int
    in_memory: int
    one_map: int

    def told_by(self, found: int | None) -> Told:
        """What a builder's figure says.

        A prediction holds where it is within planned.TOLERANCE of what is found, from planned.COMPARED_FROM_BYTES on
        (docs/costs.md), so each form explains a range of figures. An engine whose softmax works in place has one map
        less, and what is beyond the larger form is that form's all the more. Nothing is told below that size, where the
        ranges meet, as they do for few tokens, and by a figure between them.
        """
        most_fused = self.fused / (1 - TOLERANCE)
        least_in_memory = (self.in_memory - self.one_map) / (1 + TOLERANCE)
        if found is None or found < COMPARED_FROM_BYTES or most_fused >= least_in_memory:
            return "not told"
        if found >= least_in_memory:
            return "in memory"
        return "fused" if found <= most_fused else "not told"


def forms_of(config: ModelConfig, shape: Shape4, precision: str, part: str | None = None) -> Forms:
    """The predictions for an engine without a point head whose largest shape is (B, S, H, W).

    part   role of the part of a split model that it is of

    Raises InputError.
    """
    costs.check_shape(config, shape)
    policy = PrecisionPolicy(precision)
    sizes = costs.Sizes.of(config, shape)
    fused, in_memory = (
        activation_bytes(config, shape, form=form, precision=precision, part=part) for form in ("fused", "explicit")
    )
    weights = sizes.batch * config.aggregator.num_heads * (sizes.views * sizes.tokens) ** 2
    if part == "encoder":
        weights = sizes.images * config.vit.num_heads * sizes.tokens_with(config.vit.num_register_tokens) ** 2
    return Forms(fused, in_memory, weights * costs.BYTES[policy.type_of(GLOBAL_ATTENTION)])


def attention_of_profiles(
    manifest: Manifest, profiles: Sequence[Profile], found: Sequence[int], part: str | None = None
) -> list[dict[str, Any]]:
    """Of the largest shape of each profile: `shape`, `found`, `fused` and `in_memory` in bytes, and what it `told`.

    found   what the builder says of each profile; a list of another length is not told apart
    part    role of the part of a split model that the engine is of

    Empty where there is no attention, and where the predictions are of something else: a point head, experts that are
    not merged, the whole of a split model.
    Raises InputError for a precision that is no policy.
    """
    config = dataclasses.replace(manifest.config, point_head=False)
    left_out = has_point_head(manifest) or bool(config.moe and not manifest.merged_experts)
    if part == "heads" or (manifest.parts and part is None) or (part in WITH_HEADS and left_out):
        return []
    told = list(found) if len(found) == len(profiles) else [None] * len(profiles)
    rows = []
    for profile, figure in zip(profiles, told, strict=True):
        forms = forms_of(config, profile.max, manifest.precision, part)
        predicted = {"fused": forms.fused, "in_memory": forms.in_memory}
        rows.append({"shape": list(profile.max), "found": figure, **predicted, "told": forms.told_by(figure)})
    return rows
