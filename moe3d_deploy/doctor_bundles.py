"""What of a bundle can run on this machine, and why the rest cannot: the ONNX file and each engine.

Told from the manifest, the files' sizes and what `doctor` has found; no model is loaded. All reasons are told, so that
one remedy does not lead to the next refusal.
"""

import importlib.util
from typing import Any

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.distributions import reinstall
from moe3d_deploy.errors import EXTRA_OF, BundleError
from moe3d_deploy.machine import NO_VNNI, multiplies_bytes_exactly
from moe3d_deploy.manifest import EngineRecord, Manifest
from moe3d_deploy.trt import Capability, load_faults, plugin_digest, rebuild_command, title

Reasons = list[tuple[str, str]]  # why not, and what to do


def examine_bundle(path: str, libraries: dict[str, Any], cuda: dict[str, Any], available_bytes: int) -> dict[str, Any]:
    """Check names and sizes of the bundle at `path` and say what of it can run.

    libraries, cuda    as in `doctor.examine`
    available_bytes    memory that can be had now

    Returns the keys that docs/doctor.md lists, and `problems`; of a bundle with a `fault` nothing else is told.
    """
    try:
        bundle = Bundle.open(path, verify="sizes", engines=False)
        faults = bundle.engine_faults("sizes")
    except BundleError as error:
        what, _, remedy = str(error).rpartition("; ")  # as all errors of this project are built
        problem = {"level": "error", "problem": what, "remedy": remedy}
        return {"path": path, "fault": str(error), "model": None, "engines": [], "problems": [problem]}
    manifest = bundle.manifest
    onnxruntime = libraries["onnxruntime"]
    cautions = _memory_cautions(path, _model_bytes(manifest), {"this machine": available_bytes})
    model = _verdict(manifest.model_file, _model_reasons(manifest, onnxruntime), cautions)
    engines = []
    for engine in manifest.engines:
        reasons = _engine_reasons(engine, path, faults.get(engine.file), libraries, cuda)
        memory = {f"the GPU {gpu['name']}": gpu["memory_bytes"] for gpu in cuda["gpus"]}
        size = manifest.files[engine.file].size
        cautions = [] if reasons else [*_memory_cautions(path, size, memory), *_plugin_cautions(engine)]
        engines.append(_engine_facts(engine) | _verdict(engine.file, reasons, cautions))
    problems = [_problem(path, model, reason, "warning") for reason in model["reasons"]]
    for part in engines:
        # an engine for another machine is nothing wrong with this one
        level = "error" if part["file"] in faults else "note"
        problems += [_problem(path, part, reason, level) for reason in part["reasons"]]
    problems += [_problem(path, part, reason, "note") for part in (model, *engines) for reason in part["cautions"]]
    return {
        "path": path,
        "fault": None,
        "damaged_engines": sorted(faults),
        "name": manifest.name,
        "precision": manifest.precision,
        "input": manifest.inputs[0].dtype,
        "weight_bytes": _model_bytes(manifest),
        "model": model,
        "engines": engines,
        "problems": problems,
    }


def _verdict(file: str, reasons: Reasons, cautions: Reasons) -> dict[str, Any]:
    lists = {"reasons": reasons, "cautions": cautions}
    shown = {key: [{"why": why, "remedy": remedy} for why, remedy in pairs] for key, pairs in lists.items()}
    return {"file": file, "runs": not reasons, **shown}


def _problem(path: str, part: dict[str, Any], reason: dict[str, str], level: str) -> dict[str, str]:
    said = "may not run here" if reason in part["cautions"] else "does not run here"
    return {"level": level, "problem": f"{path}/{part['file']} {said}: {reason['why']}", "remedy": reason["remedy"]}


def _engine_facts(engine: EngineRecord) -> dict[str, Any]:
    capabilities = [f"{value // 10}.{value % 10}" for value in engine.compute_capabilities]
    return {
        "builder": engine.builder,
        "builder_version": engine.builder_version,
        "compute_capabilities": capabilities,
        "plugin_sha256": plugin_digest(engine),
    }


def _model_bytes(manifest: Manifest) -> int:
    """The ONNX file with its weights."""
    engines = {engine.file for engine in manifest.engines}
    return sum(entry.size for name, entry in manifest.files.items() if name not in engines)


def _model_reasons(manifest: Manifest, onnxruntime: dict[str, Any]) -> Reasons:
    reasons: Reasons = []
    if not onnxruntime["installed"]:
        reasons.append(("ONNX Runtime is not installed", "pip install 'moe3d-deploy[cpu]'"))
    elif onnxruntime["fault"]:
        reasons.append((f"ONNX Runtime {onnxruntime['fault']}", reinstall("onnxruntime")))
    elif "CPUExecutionProvider" not in onnxruntime["providers"]:
        reasons.append(("this ONNX Runtime has no CPU provider", "pip install 'moe3d-deploy[cpu]'"))
    if manifest.only_in_tensorrt:
        # No MatMul, Add, Softmax, Gelu or Conv in bf16 (ONNX Runtime 1.31).
        remedy = "export with --precision fp32 or fp16 to run it here"
        reasons.append(("ONNX Runtime computes no bf16 on a CPU", remedy))
    if manifest.only_in_onnxruntime and not multiplies_bytes_exactly():
        reasons.append((NO_VNNI, "export with --precision fp32 or fp16 to run it here"))
    return reasons


def _memory_cautions(path: str, needed: int, available: dict[str, int]) -> Reasons:
    """Weights that are larger than the memory. No refusal: mapped files can be dropped and read again, slowly."""
    if not available or needed <= max(available.values()):
        return []
    place = max(available, key=lambda name: available[name])
    text = f"its weights alone take {needed / 1e9:.2f} GB, {place} has {available[place] / 1e9:.2f} GB for them"
    return [(text, f"free some memory, or see what fits: moe3d plan {path}")]


def _plugin_cautions(engine: EngineRecord) -> Reasons:
    """A library that is nowhere near the bundle, and that only the one who loads the engine can name."""
    digest = plugin_digest(engine)
    if digest is None:
        return []
    return [(f"it needs the plugin library of SHA-256 {digest}", "give that library where the engine is loaded")]


def _engine_reasons(
    engine: EngineRecord, path: str, fault: str | None, libraries: dict[str, Any], cuda: dict[str, Any]
) -> Reasons:
    name, module = title(engine.builder), engine.builder.replace("-", "_")
    extra, library = EXTRA_OF[module], libraries[module]
    gpus = _gpus(cuda)
    rebuild = rebuild_command(path, engine, gpus)
    reasons: Reasons = []
    if fault:
        reasons.append((fault, rebuild))
    if not library["installed"] or importlib.util.find_spec("polygraphy") is None:
        missing = "Polygraphy" if library["installed"] else name
        reasons.append((f"{missing} is not installed", f"pip install 'moe3d-deploy[{extra}]'"))
    elif library["fault"]:
        reasons.append((f"{name} {library['fault']}", reinstall(module)))
    faults = load_faults(engine, version=library["version"], gpus=gpus, plugin=plugin_digest(engine))
    reasons += [(what, rebuild) for what in faults]
    return [*reasons, *_gpu_reasons(cuda)]


def _gpus(cuda: dict[str, Any]) -> list[Capability]:
    pairs = (gpu["compute_capability"].split(".") for gpu in cuda["gpus"])
    return [(int(major), int(minor)) for major, minor in pairs]


def _gpu_reasons(cuda: dict[str, Any]) -> Reasons:
    if cuda["gpus"]:
        return []
    why = {"absent": "there is no CUDA driver", "faulty": f"the CUDA driver {cuda['fault']}"}
    text = why.get(cuda["driver"], "the CUDA driver shows this process no GPU")
    return [(text, "run engines on a machine with an NVIDIA GPU; the ONNX file needs none")]
