"""What a parity measurement consists of: the reference, every variant, and which of them cannot run here and why."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe3d_deploy import costs
from moe3d_deploy.benchmarks.bench.parity import COMPARED, NOT_RUN, Shape, Variant
from moe3d_deploy.benchmarks.bench.parity_shapes import default_shapes, in_profiles
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import InputError
from moe3d_deploy.export.compare import Limits
from moe3d_deploy.export.contract import DEFAULT_OUTPUTS
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.manifest import BUILDERS, EngineRecord, Manifest

LARGEST_IN_FLOAT64 = 50_000_000  # parameters
_ALWAYS = ("fp16", "bf16")
_OF_WEIGHTS = "the bundle names the checkpoint's SHA-256"
_OF_CONFIG = "the bundle names no digest of its weights: its config alone was compared"
_TORCH = {
    "fp32": "float32 without TF32",
    "16-bit": "16-bit weights; on a CPU float32 sums of every product, rounded to 16 bits as a GPU does",
}
_RUNTIME = {
    "fp32": "ONNX Runtime's own",
    "16-bit": "on a CPU ONNX Runtime computes 16-bit graphs in float32: the weights are rounded, products are not",
    "8-bit": "ONNX Runtime's own, products in 8 bits",
}


@dataclass(frozen=True)
class PlannedVariant:
    """A variant before it is measured.

    model      of `parity_models.open_model`; empty where the status is NOT_RUN
    names      the outputs whose errors count
    left_out   why a shape cannot be run, or None
    """

    backend: str
    name: str
    precision: str
    arithmetic: str
    weights: str
    model: dict[str, Any]
    names: tuple[str, ...]
    status: str = COMPARED
    reason: str | None = None
    left_out: Callable[[Shape], str | None] = lambda shape: None

    @property
    def label(self) -> str:
        return self.variant().label

    @property
    def runs(self) -> bool:
        """Whether it can run here, as far as can be told."""
        return self.status == COMPARED

    def variant(self) -> Variant:
        """The entry of the report, without anything measured."""
        return Variant(
            self.backend, self.name, self.precision, None, self.arithmetic, self.weights,
            Limits.of(self.precision).errors, self.status, self.reason, (),
        )  # fmt: skip


@dataclass(frozen=True)
class ParityPlan:
    """The reference, in PyTorch, and everything that is compared with it; `names` are the outputs of which errors are
    wanted of any."""

    model: str
    config: ModelConfig
    sha256: str | None
    parameters: int
    reference: str
    reference_model: dict[str, Any]
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    variants: tuple[PlannedVariant, ...]


def plan_parity(spec: SourceSpec, bundles: Sequence[str], shapes: Sequence[Shape] = ()) -> ParityPlan:
    """Everything about `spec` and the bundles of its weights; no weight is loaded.

    shapes   (B, S, H, W) in pixels; empty: `default_shapes`

    Raises InputError for a bundle of other weights, for two of one name, and for a shape that the model does not take;
    what opening the checkpoint or a bundle raises.
    """
    source = spec.open()
    config = source.config
    for shape in shapes:
        costs.check_shape(config, shape)
    digest = source.sha256() if bundles else None
    opened = [Bundle.open(path, verify="sizes", engines=False) for path in bundles]
    for bundle in opened:
        PrecisionPolicy(bundle.manifest.precision)
    weights = [_same_weights(bundle, config, digest, spec.source) for bundle in opened]
    _require_own_names(opened)
    asked = {tensor.name: None for bundle in opened for tensor in bundle.manifest.outputs}
    names = tuple(dict.fromkeys((*DEFAULT_OUTPUTS, *asked)))
    extra = [name for name in names if name not in DEFAULT_OUTPUTS]
    if config.moe and "expert_weights" not in extra:
        extra.append("expert_weights")
    parameters = sum(costs.parameters(config).values())
    in_float64 = parameters < LARGEST_IN_FLOAT64
    reference = "fp64" if in_float64 else "fp32"

    def in_torch(precision: str) -> dict[str, Any]:
        return {
            "kind": "pytorch",
            "source": dataclasses.asdict(spec),
            "precision": precision,
            "outputs": extra,
        }

    precisions = dict.fromkeys(("fp32", *_ALWAYS, *(bundle.manifest.precision for bundle in opened)))
    variants = [
        PlannedVariant(
            "pytorch",
            source.name,
            precision,
            _TORCH[_kind(precision)],
            "the checkpoint itself",
            in_torch(precision),
            names,
        )
        for precision in precisions
        if precision != reference and _kind(precision) in _TORCH
    ]
    for bundle, known in zip(opened, weights, strict=True):
        variants += [_of_bundle(bundle, known), *_engines(bundle, known)]
    return ParityPlan(
        model=source.name,
        config=config,
        sha256=digest,
        parameters=parameters,
        reference=reference,
        reference_model=in_torch(reference),
        names=names,
        shapes=tuple(dict.fromkeys(shapes)) or tuple(default_shapes(config)),
        variants=tuple(variants),
    )


def _same_weights(bundle: Bundle, config: ModelConfig, digest: str | None, source: str) -> str:
    """How it is known that the bundle is of the checkpoint. Raises InputError where it is known not to be."""
    manifest = bundle.manifest
    remedy = "name the checkpoint that it was made of, or export it again"
    theirs = manifest.config
    if dataclasses.replace(config, point_head=theirs.point_head) != theirs:
        raise InputError(f"bundle {bundle.path} was not made of {source}: its model config is another; {remedy}")
    if manifest.checkpoint.sha256 is None:
        return _OF_CONFIG
    if manifest.checkpoint.sha256 != digest:
        raise InputError(
            f"bundle {bundle.path} was not made of {source}: it is of {manifest.checkpoint.origin}, weights of "
            f"SHA-256 {manifest.checkpoint.sha256[:12]}..., the checkpoint's is {str(digest)[:12]}...; {remedy}"
        )
    return _OF_WEIGHTS


def _require_own_names(bundles: Sequence[Bundle]) -> None:
    """Raise InputError for two bundles that a report could not tell apart."""
    names: dict[str, Path] = {}
    for bundle in bundles:
        name = _name(bundle)
        if name in names:
            raise InputError(f"{names[name]} and {bundle.path} are both called {name} in a report; rename one of them")
        names[name] = bundle.path


def _of_bundle(bundle: Bundle, weights: str) -> PlannedVariant:
    manifest = bundle.manifest
    split = f", split into {' and '.join(part.role for part in manifest.parts)}" if manifest.parts else ""
    planned = PlannedVariant(
        "onnxruntime",
        _name(bundle),
        manifest.precision,
        _RUNTIME[_kind(manifest.precision)] + split,
        weights,
        {"kind": "bundle", "path": str(bundle.path)},
        _outputs(manifest),
        left_out=lambda shape: None if manifest.shape_ranges.takes(shape) else "not in the bundle's range",
    )
    if manifest.only_in_tensorrt:
        return _not_run(planned, "ONNX Runtime has no bf16 kernels on a CPU: an engine runs this bundle, on a GPU")
    return planned


def _engines(bundle: Bundle, weights: str) -> Iterator[PlannedVariant]:
    """An entry for every engine, and for every builder that the bundle has none of."""
    manifest = bundle.manifest
    for builder in BUILDERS:
        records = [record for record in manifest.engines if record.builder == builder]
        for record in records:
            planned = PlannedVariant(
                builder,
                f"{_name(bundle)}/{Path(record.file).name}",
                manifest.precision,
                "the engine's own, on a GPU",
                weights,
                {"kind": "engine", "path": str(bundle.path), "file": record.file},
                _outputs(manifest),
                left_out=lambda shape, record=record: (  # type: ignore[misc]
                    None if in_profiles(record, shape) else "in none of the engine's profiles"
                ),
            )
            reason = _why_not(record)
            yield _not_run(planned, reason) if reason else planned
        if not records:
            none = PlannedVariant(builder, _name(bundle), manifest.precision, "none", weights, {}, _outputs(manifest))
            yield _not_run(none, "the bundle has no such engine")


def _why_not(record: EngineRecord) -> str | None:
    """Why an engine cannot run on this machine."""
    from moe3d_deploy import trt

    gpus = trt.visible_gpus()
    if not gpus:
        return "no NVIDIA GPU is visible here"
    version = trt.available().get(record.builder)
    if version is None:
        return f"{trt.title(record.builder)} is not installed here"
    if faults := trt.load_faults(record, version=version, gpus=gpus[:1]):
        return "; ".join(faults)
    return "it runs a part of a split model, and parts are not compared" if record.part else None


def _not_run(planned: PlannedVariant, reason: str) -> PlannedVariant:
    return dataclasses.replace(planned, status=NOT_RUN, reason=reason, model={})


def _outputs(manifest: Manifest) -> tuple[str, ...]:
    return tuple(tensor.name for tensor in manifest.outputs)


def _name(bundle: Bundle) -> str:
    return bundle.path.resolve().name


def _kind(precision: str) -> str:
    policy = PrecisionPolicy(precision)
    return "16-bit" if policy.sixteen_bit else "8-bit" if policy.eight_bit else "fp32"
