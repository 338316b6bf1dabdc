"""The forms of one head in one process, turn after turn. Runs as a child, so that a crash is the case's alone."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from moe3d_deploy.benchmarks.bench.price import BUNDLE, TURN, PriceRound
from moe3d_deploy.benchmarks.bench.price_agreement import LIMITS, disagreements
from moe3d_deploy.benchmarks.bench.state import machine_state
from moe3d_deploy.benchmarks.timing import Effort, Timer, collect_parts
from moe3d_deploy.child import Emit
from moe3d_deploy.config import ModelConfig, MoeConfig
from moe3d_deploy.errors import Moe3dError

_DIGITS = 4  # decimals of a millisecond that are kept: a tenth of a microsecond


class Subject(Protocol):
    """Something that has forms, all of which run on the same inputs."""

    forms: tuple[str, ...]
    device: str
    threads: int
    activations_by: str

    def renew(self, seed: int) -> None:
        """New random inputs for all forms."""

    def timer(self, form: str) -> Timer: ...

    def activations(self, form: str) -> tuple[list[NDArray[Any]], int | None]:
        """One run of a form: its depth and confidence, and the bytes that it needed."""


def measure_price(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child: the `price.PriceRound` of a case, as JSON.

    backend, part, shape, precision, threads, seed
    source, config, moe   of the checkpoint, and the experts' config
    library               of the kernel, or None
    files                 {form: file} of dense heads, of ONNX Runtime
    bundle, bundle_form   of the part BUNDLE
    effort                of all turns, `timing.Effort`
    """
    emit({"step": "loading"})
    subject = _open(request)
    found = measure(
        subject,
        seed=request["seed"],
        effort=Effort(**request["effort"]),
        limit=LIMITS[request["precision"]],
        step=lambda text: emit({"step": text}),
    )
    return dataclasses.asdict(found)


def measure(
    subject: Subject, *, seed: int, effort: Effort, limit: float, step: Callable[[str], None] = lambda text: None
) -> PriceRound:
    """One run of every form for its result and its memory, then turns in which every form runs once.

    Every turn has new inputs, the same for all forms. Every other turn goes through the forms backwards, so that none
    is always the one after another.

    limit   how far forms may be from the plain one, as a share of each value

    Raises Moe3dError where they are farther.
    """
    step("comparing the forms")
    subject.renew(seed)
    maps, activations = {}, {}
    for form in subject.forms:
        maps[form], activations[form] = subject.activations(form)
    if wrong := [f"{form}: {fault}" for form, fault in disagreements(maps, limit)]:
        raise Moe3dError(f"the forms do not give one result, so their times say nothing: {'; '.join(wrong)}")
    maps.clear()

    step("turns")
    timers = {form: subject.timer(form) for form in subject.forms}
    turns = 0

    def turn() -> dict[str, float]:
        nonlocal turns
        turns += 1
        subject.renew(seed + turns)
        order = list(timers) if turns % 2 else list(reversed(timers))
        times = {form: timers[form]() for form in order}
        return {**times, TURN: sum(times.values())}

    before = machine_state()
    series = collect_parts(turn, whole=TURN, effort=effort)
    whole = series.pop(TURN)
    return PriceRound(
        seed=seed,
        device=subject.device,
        threads=subject.threads,
        warmup_turns=whole.warmup_runs,
        stable=whole.stable,
        series={form: tuple(round(value, _DIGITS) for value in series[form].times_ms) for form in subject.forms},
        activations_bytes=activations,
        activations_by=subject.activations_by,
        before=before,
        after=machine_state(),
    )


def _open(request: dict[str, Any]) -> Subject:
    """The case's subject; only the library that runs it is loaded."""
    batch, views, height, width = request["shape"]
    shape = (batch, views, height, width)
    if request["part"] == BUNDLE:
        from moe3d_deploy.benchmarks.bench.price_onnx import OnnxBundle

        return OnnxBundle(request["bundle"], request["bundle_form"], shape, threads=request["threads"])
    if request["backend"] == "onnxruntime":
        from moe3d_deploy.benchmarks.bench.price_onnx import OnnxHeads

        files = {form: Path(path) for form, path in request["files"].items()}
        return OnnxHeads(files, ModelConfig.from_dict(request["config"]), shape, threads=request["threads"])
    import torch

    from moe3d_deploy.benchmarks.bench.price_torch import torch_subject
    from moe3d_deploy.export.source import SourceSpec

    return torch_subject(
        SourceSpec(**request["source"]),
        request["part"],
        MoeConfig(**request["moe"]),
        shape,
        precision=request["precision"],
        library=Path(request["library"]) if request["library"] else None,
        threads=request["threads"],
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
