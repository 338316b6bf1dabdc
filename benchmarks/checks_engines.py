"""GPU check of a TensorRT-RTX engine: does this card load it, does it run, is its depth PyTorch's?

An engine for other cards is tried as well: whether it runs is the question, and the library's own words are the answer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe3d_deploy import trt
from moe3d_deploy.benchmarks.bundle_reference import Reference, compare, find_bundle, text
from moe3d_deploy.benchmarks.checks import CheckRun
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.child import Emit, run_in_child
from moe3d_deploy.engines.build import build
from moe3d_deploy.engines.inspector import inspected, not_told
from moe3d_deploy.engines.shapes import Shape4, ShapeProfile
from moe3d_deploy.errors import EngineError, InputError, Moe3dError

BUILDER = "tensorrt-rtx"
_BEGINNING = 2_000  # characters
VIEWS, HEIGHT, WIDTH = "1:2:4", "140:392:518", "140:518:518"  # of an engine that is built here


@dataclass(frozen=True)
class _Engine:
    """An engine to try: of the bundle, or just built."""

    name: str
    path: Path
    capabilities: tuple[int, ...]  # 89 is 8.9
    version: str
    profile: ShapeProfile
    built_here: bool


def rtx_engine_runs(run: CheckRun) -> None:
    """Load and run every TensorRT-RTX engine of the bundle, or one built here, at several shapes of its profile."""
    trt.require(BUILDER)
    cards = trt.visible_gpus()
    if not cards:
        run.skip("the CUDA driver shows no GPU")
    card, bundle = cards[0], find_bundle(run)
    run.record(tensorrt_rtx=trt.available()[BUILDER], card=10 * card[0] + card[1], engines=[])
    reference = Reference(run, bundle.manifest)
    found: list[dict[str, Any]] = []
    for engine in _engines_of(bundle) or [_build(run, bundle, card)]:
        facts: dict[str, Any] = {
            "name": engine.name,
            "builder_version": engine.version,
            "compute_capabilities": list(engine.capabilities),
            "built_for_this_card": 10 * card[0] + card[1] in engine.capabilities,
            "built_here": engine.built_here,
        }
        found.append(facts)
        _load(run, engine, facts, found)
        if facts["loading"].get("loaded"):
            _run(run, engine, reference, facts, found)
            _inspect(run, engine, facts, found)


def try_to_load(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child function: what the library says of the engine in the file request["plan"], before and while loading it.

    Emits what it knows so far: validity and diagnostics, where this version has them, before the load.
    """
    library = trt.load(BUILDER)

    class Log(library.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity != library.ILogger.Severity.VERBOSE:
                says.append(f"{severity.name}: {message}")

    says: list[str] = []
    facts: dict[str, Any] = {"says": says}
    log = Log()
    runtime = library.Runtime(log)
    plan = Path(request["plan"]).read_bytes()
    if hasattr(runtime, "get_engine_validity"):
        validity, bits = runtime.get_engine_validity(plan)
        reasons = library.EngineInvalidityDiagnostics.__members__.items()
        facts |= {"validity": validity.name, "diagnostics": [name for name, bit in reasons if int(bits) & bit.value]}
    emit(facts)
    facts["loaded"] = runtime.deserialize_cuda_engine(plan) is not None
    return facts


def inspect(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child function: what the engine inspector tells of the engine in the file request["plan"].

    The beginning of its text is kept as it is: its form on a card has not been seen yet.
    """
    text = trt.layer_information(request["plan"], builder=BUILDER)
    return {**inspected(text, ()), "characters": len(text), "begins": text[:_BEGINNING]}


def shapes_to_try(profile: ShapeProfile) -> list[Shape4]:
    """The profile's own three shapes and one between them, (B, S, H, W)."""
    patch = profile.patch_size
    low, high = profile.min, profile.max
    sizes = [(low[i] + high[i]) // 2 // patch * patch for i in (2, 3)]
    between = (low[0], (low[1] + high[1] + 1) // 2, max(low[2], sizes[0]), max(low[3], sizes[1]))
    return list(dict.fromkeys((profile.min, profile.opt, profile.max, between)))


def _engines_of(bundle: Bundle) -> list[_Engine]:
    patch = bundle.manifest.config.patch_size
    return [
        _Engine(
            Path(record.file).name,
            bundle.engine_path(record),
            record.compute_capabilities,
            record.builder_version,
            ShapeProfile(record.profiles[0].min, record.profiles[0].opt, record.profiles[0].max, patch),
            built_here=False,
        )
        for record in bundle.manifest.engines
        if record.builder == BUILDER
    ]


def _build(run: CheckRun, bundle: Bundle, card: trt.Capability) -> _Engine:
    """Build for this card, too, if the builder offers it; the user's bundle is left as it is."""
    run.step("building an engine")
    profile = ShapeProfile.from_ranges(
        views=VIEWS, height=HEIGHT, width=WIDTH, patch_size=bundle.manifest.config.patch_size
    )
    plan = run.work / "engine.plan"

    def attempt(capabilities: tuple[trt.Capability, ...]) -> dict[str, Any]:
        return build(
            bundle.model_path,
            plan,
            profile,
            precision=bundle.manifest.precision,
            builder=BUILDER,
            compute_capabilities=capabilities,
        )

    try:
        record = attempt((*trt.RTX_CAPABILITIES, card))
    except (InputError, EngineError) as error:  # none of the builder's cards, or one that it cannot build this for
        run.note(str(error))
        record = attempt(trt.RTX_CAPABILITIES)
    run.record(build=record["build"], audit=record["audit"])
    capabilities = tuple(record["compute_capabilities"])
    return _Engine(plan.name, plan, capabilities, record["builder_version"], profile, built_here=True)


def _load(run: CheckRun, engine: _Engine, facts: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """Ask the library in a process of its own first: what it says is kept even if it ends the process."""
    run.step(f"loading {engine.name}")
    facts["loading"] = {}

    def keep(so_far: dict[str, Any]) -> None:
        facts["loading"] = so_far
        run.record(engines=found)

    try:
        keep(run_in_child(f"{__name__}:try_to_load", {"plan": str(engine.path)}, on_event=keep).value)
    except Moe3dError as error:
        keep({**facts["loading"], "loaded": False, "crash": str(error)})
    loading = facts["loading"]
    if not loading["loaded"]:
        told = loading.get("says", [])
        words = loading.get("crash") or next((line for line in told if "ERROR: " in line), "nothing")
        verdict = " ".join([loading.get("validity", ""), *loading.get("diagnostics", ())]).strip()
        run.fail(f"{engine.name} does not load; validity: {verdict or 'not told'}; the library says: {words}")


def _inspect(run: CheckRun, engine: _Engine, facts: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """Last, and no failure: that it tells nothing is an answer as well."""
    run.step(f"inspecting {engine.name}")
    try:
        facts["inspector"] = run_in_child(f"{__name__}:inspect", {"plan": str(engine.path)}).value
    except Moe3dError as error:
        facts["inspector"] = not_told(str(error))
    run.record(engines=found)
    if not facts["inspector"]["told"]:
        run.note(f"{engine.name}: the engine inspector tells nothing: {facts['inspector']['reason']}")


def _run(
    run: CheckRun, engine: _Engine, reference: Reference, facts: dict[str, Any], found: list[dict[str, Any]]
) -> None:
    facts["shapes"] = []
    try:
        with trt.EngineRunner(engine.path, builder=BUILDER, built_by=engine.version) as runner:
            for shape in shapes_to_try(engine.profile):
                batch, views, height, width = shape
                patches = (batch, views, height // reference.patch_size, width // reference.patch_size)
                label = f"{engine.name} at {text(shape)}"
                run.step(f"running {label}")
                outputs = runner.run({"images": reference.images(patches)})
                expected = reference.outputs(patches)
                measured = compare(run, label, outputs, expected, reference.precision)
                facts["shapes"].append({"shape": list(shape), "errors": measured})
                run.record(engines=found)
    except EngineError as error:
        facts["run_error"] = str(error)
        run.record(engines=found)
        run.fail(str(error))
