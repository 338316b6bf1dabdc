"""The training objective of a scene: depth, cameras and the gate's entropy, each a mean, weighted and added.

    L = l_d L_depth + l_c L_camera + l_e L_entropy

The scenes of a batch go through the same operations; a mean is over one scene, and a function returns one per scene.

Everything is computed in float32 at least, whatever precision the model ran in. At an invalid pixel no value, NaN and
infinity included, reaches a result, and the gradient of the model's output is 0. (Behind it, an exponential that has
overflowed there still makes NaN of that 0.) A scene without a valid pixel gives NaN: `targets` refuses it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe3d_deploy.errors import InputError
from moe3d_deploy.model.experts import gate_entropy
from moe3d_deploy.training.forward import Outputs
from moe3d_deploy.training.targets import Targets

CAMERA_LOSSES = ("l1", "huber")
_LEAST_WEIGHT = 1e-30  # of an expert whose logarithm is taken; a softmax underflows to 0


@dataclass(frozen=True)
class LossOptions:
    """Which losses, and their weights. Raises InputError for a kind that does not exist or a weight below 0."""

    depth: str = "l2"  # a key of DEPTH_LOSSES
    depth_weight: float = 1.0  # l_d
    camera_weight: float = 1.0  # l_c; VGGT's published training code has 5
    entropy_weight: float = 0.0  # l_e; the paper's gate collapses from 1e-3 on
    alpha: float = 0.2  # of "vggt" and "log": the reward of confidence; VGGT's
    gradient_weight: float = 1.0  # of "vggt" and "log": the gradient term beside the error
    gradient_scales: int = 4  # of "vggt" and "log": every pixel, every 2nd, 4th, 8th
    sigma_floor: float = 1e-3  # of "nll": added to every expert's sigma, in units of normalised depth
    camera: str = "l1"  # one of CAMERA_LOSSES; VGGT's paper has Huber, its training code L1
    huber_delta: float = 0.1  # of "huber": quadratic below, linear above
    gamma: float = 0.6  # of the camera iterations
    translation_weight: float = 1.0  # within the camera loss, as the next two; VGGT's
    quaternion_weight: float = 1.0
    fov_weight: float = 0.5

    def __post_init__(self) -> None:
        for name, choices in (("depth", tuple(DEPTH_LOSSES)), ("camera", CAMERA_LOSSES)):
            if (value := getattr(self, name)) not in choices:
                raise InputError(f"{name} loss {value!r} is unknown; choose from {', '.join(choices)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not (math.isfinite(value) and value >= 0):
                raise InputError(f"loss option {field.name} must be a number >= 0, got {value}")
        for name in ("sigma_floor", "huber_delta", "gradient_scales"):
            if getattr(self, name) == 0:
                raise InputError(f"loss option {name} must be above 0")


def objective(outputs: Outputs, targets: Targets, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """`scene_objectives` of all views as one scene, so that every valid pixel counts alike: scalars."""

    def one_scene(x: Tensor) -> Tensor:
        return x.flatten(0, 1)[None]

    poses = [one_scene(pose) for pose in outputs.pose_iterations]
    maps = {name: one_scene(x) for name, x in outputs._asdict().items() if isinstance(x, Tensor)}
    truth = targets._replace(depth=one_scene(targets.depth), valid=one_scene(targets.valid))
    if poses:
        truth = truth._replace(pose_enc=one_scene(targets.pose_enc))
    total, parts = scene_objectives(outputs._replace(**maps, pose_iterations=poses), truth, options)  # type: ignore[arg-type]
    return total[0], {name: part[0] for name, part in parts.items()}


def scene_objectives(outputs: Outputs, targets: Targets, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise of each scene, (B,), and its parts for a log: (B,), no gradients, before l_d, l_c and l_e.

    Parts: `loss` (the sum), `depth` and what it is made of, `camera` with `camera_translation`, `camera_quaternion`,
    `camera_fov` unless `outputs` has no cameras, `entropy` unless the model has no gate.
    """
    maps = {name: _at_least_float32(x) for name, x in outputs._asdict().items() if isinstance(x, Tensor)}
    outputs = outputs._replace(**maps)  # type: ignore[arg-type]
    depth, parts = DEPTH_LOSSES[options.depth](outputs, targets, options)
    total = options.depth_weight * depth
    parts = {"depth": depth, **parts}
    if outputs.pose_iterations:
        camera, of_camera = camera_loss(outputs.pose_iterations, targets.pose_enc, options)
        total = total + options.camera_weight * camera
        parts |= {"camera": camera, **of_camera}
    if outputs.weights is not None:
        entropy = entropy_loss(outputs.weights if options.entropy_weight else outputs.weights.detach())
        total = total + options.entropy_weight * entropy
        parts["entropy"] = entropy
    return total, {"loss": total.detach(), **{name: part.detach() for name, part in parts.items()}}


def squared_error(outputs: Outputs, targets: Targets, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """mean over valid pixels of (D - D*)^2, D the mixed depth.

    Source: MoE3D (Wang et al. 2026), which drops VGGT's confidence weighting and gradient loss.
    """
    predicted, true = _masked(targets.valid, outputs.depth, targets.depth)
    return _mean((predicted - true) ** 2, targets.valid), {}


def mixture_nll(outputs: Outputs, targets: Targets, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """mean over valid pixels of -log sum_k w_k N(D*; D_k, sigma_k), in nats.

    log N(x; m, s) = -log s - ((x - m) / s)^2 / 2 - log(2 pi) / 2.   sigma_k = floor + exp(-c_k) with c_k the expert's
    second channel: the confidence 1 + exp(c_k) that the model reports is then about 1 + 1 / sigma_k, grows with
    certainty as VGGT's does, and no weight is added to the checkpoint. The floor bounds the likelihood, which one exact
    hit would otherwise raise without end. Without experts K = 1.
    Source: MoE3D (Wang et al. 2026) trains the mixture sum_k w_k p_k; Gaussians and sigma are this project's choice.
    """
    if outputs.candidates is None or outputs.weights is None:
        centres, weights = outputs.depth[:, :, None], torch.ones_like(outputs.log_sigma)
    else:
        centres, weights = outputs.candidates, outputs.weights
    valid = targets.valid[:, :, None]
    centres, weights, log_sigma, true = _masked(valid, centres, weights, outputs.log_sigma, targets.depth[:, :, None])
    log_sigma = torch.logaddexp(log_sigma, log_sigma.new_tensor(math.log(options.sigma_floor)))
    distance = (true - centres) * (-log_sigma).exp()
    log_density = -log_sigma - distance**2 / 2 - math.log(2 * math.pi) / 2
    log_weights = weights.clamp(min=_LEAST_WEIGHT).log()
    return _mean(-(log_weights + log_density).logsumexp(dim=2), targets.valid), {}


def vggt_depth(outputs: Outputs, targets: Targets, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """mean of C |D - D*| - alpha log C, plus the gradient term of D - D* weighted by C.

    C is the predicted confidence, the gradient term is `gradient_term`'s.
    Source: VGGT (Wang et al. 2025), section 3.3. alpha and the scales of the gradient are those of its training code,
    which in addition counts the error once without C, takes the gradient without C, and leaves out the largest 2 % of
    the errors: three things that the paper does not have, nor this.
    """
    predicted, true, confidence = _masked(targets.valid, outputs.depth, targets.depth, outputs.confidence)
    return _with_confidence(predicted - true, confidence, targets.valid, options, gradient_weights=confidence)


def log_depth(outputs: Outputs, targets: Targets, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """mean of C |r| - alpha log C with r = log D - log D*, plus the gradient term of r.

    For training from scratch: the logarithm makes near and far count alike and D = 1 a start from which all depths are
    equally well reached, where a squared error starts with the far ones alone. The gradient term has no C, so that a
    low confidence cannot pay for a blurred edge. This project's.
    """
    predicted, true, confidence = _masked(targets.valid, outputs.depth, targets.depth, outputs.confidence)
    return _with_confidence(predicted.log() - true.log(), confidence, targets.valid, options, gradient_weights=None)


DepthLoss = Callable[[Outputs, Targets, LossOptions], tuple[Tensor, dict[str, Tensor]]]
DEPTH_LOSSES: dict[str, DepthLoss] = {
    "l2": squared_error,
    "nll": mixture_nll,
    "vggt": vggt_depth,
    "log": log_depth,
}


def camera_loss(
    pose_iterations: Sequence[Tensor], true: Tensor, options: LossOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """(1 / n) sum_i gamma^(n-1-i) (a T_i + b Q_i + c V_i) over the iterations i = 0..n-1, and the three sums.

    pose_iterations  n of (B, S, 9), true (B, S, 9): see `targets.pose_encoding`; all results are (B,)
    T, Q, V are mean errors of translation, quaternion and fields of view over their components: |x| or, for "huber",
    x^2 / (2 delta) up to delta and |x| - delta / 2 beyond. Source: VGGT (Wang et al. 2025), weights of its training
    code (a, b, c = 1, 1, 0.5).
    """
    error = (_at_least_float32(torch.stack(list(pose_iterations))) - _at_least_float32(true)).abs()
    if options.camera == "huber":
        delta = options.huber_delta
        error = torch.where(error < delta, error**2 / (2 * delta), error - delta / 2)
    count = len(error)
    later = torch.arange(count - 1, -1, -1, dtype=error.dtype, device=error.device)
    of_components = ((options.gamma**later / count)[:, None, None] * error.mean(2)).sum(0)
    translation, quaternion, fov = (part.mean(1) for part in of_components.split([3, 4, 2], dim=1))
    weights = (options.translation_weight, options.quaternion_weight, options.fov_weight)
    loss = weights[0] * translation + weights[1] * quaternion + weights[2] * fov
    return loss, {"camera_translation": translation, "camera_quaternion": quaternion, "camera_fov": fov}


def entropy_loss(weights: Tensor) -> Tensor:
    """mean over all pixels of -sum_k w_k log w_k, in nats, (B,); weights (B, S, K, H, W) sum to 1 over K.

    0 where one expert decides everywhere, log K where none does. Minimising it drives the gate towards one-hot.
    Source: MoE3D (Wang et al. 2026).
    """
    entropy = gate_entropy(_at_least_float32(weights).flatten(0, 1))
    return entropy.unflatten(0, weights.shape[:2]).mean((1, 2, 3))


def gradient_term(residual: Tensor, valid: Tensor, weights: Tensor | None, scales: int) -> Tensor:
    """How much a residual map changes from pixel to pixel: a flat error costs nothing, a blurred edge does.

    residual  (B, ..., H, W), finite everywhere; valid (B, ..., H, W) bool; weights (B, ..., H, W) or None for 1
    returns   (B,), (1 / scales) sum over the scales s of (1 / N_s) sum of w |r - r'| over horizontal and vertical
              neighbours that are both valid, in the map of every 2^s-th row and column with N_s valid pixels; w is the
              mean of the two. A scale without a valid pixel adds nothing.

    Source: the multi-scale gradient matching of MegaDepth (Li and Snavely 2018) and MiDaS, as VGGT's training code
    counts it.
    """
    total = residual.new_zeros(len(residual))
    for scale in range(scales):
        step = 2**scale
        r, v = residual[..., ::step, ::step], valid[..., ::step, ::step]
        w = None if weights is None else weights[..., ::step, ::step]
        count = _sum(v).clamp(min=1)
        for axis in (-2, -1):
            pairs = r.shape[axis] - 1
            change = r.diff(dim=axis).abs() * (v.narrow(axis, 0, pairs) & v.narrow(axis, 1, pairs))
            if w is not None:
                change = change * (w.narrow(axis, 0, pairs) + w.narrow(axis, 1, pairs)) / 2
            total = total + _sum(change) / count
    return total / scales


def _with_confidence(
    residual: Tensor, confidence: Tensor, valid: Tensor, options: LossOptions, gradient_weights: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    error = residual.abs()
    loss = _mean(confidence * error - options.alpha * confidence.log(), valid)
    parts = {"depth_error": _mean(error, valid)}
    if options.gradient_weight:
        gradient = gradient_term(residual, valid, gradient_weights, options.gradient_scales)
        loss = loss + options.gradient_weight * gradient
        parts["depth_gradient"] = gradient
    return loss, parts


def _masked(valid: Tensor, *maps: Tensor) -> list[Tensor]:
    """1 at invalid pixels, before any arithmetic: 0 times a gradient that is not finite would be NaN."""
    return [torch.where(valid, x, 1) for x in maps]


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    return _sum(x * valid) / _sum(valid)


def _sum(x: Tensor) -> Tensor:
    """Of each scene: over all axes but the first."""
    return x.flatten(1).sum(1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
