"""Whether an engine can be loaded here, told before any library sees a byte of it, and the command that rebuilds it.

The rules of the runtime and of `moe3d doctor` alike; nothing is loaded for them. They are those of NVIDIA's pages on
engine compatibility (TensorRT 10.16 and 11.1 to 11.4, TensorRT-RTX 1.x).
"""

import hashlib
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.bundle_files import check_file
from moe3d_deploy.errors import BundleError, EngineError
from moe3d_deploy.manifest import EngineRecord, Profile
from moe3d_deploy.trt import installed
from moe3d_deploy.trt.features import RTX_TARGETS, RULES, version_of
from moe3d_deploy.trt.installed import RTX_CAPABILITIES, Capability
from moe3d_deploy.trt.plugin_library import PluginLibrary

_OLDEST_COMPATIBLE_GPU: Capability = (8, 0)
_JETSON: frozenset[Capability] = frozenset({(8, 7), (10, 1), (11, 0)})  # Orin and Thor: no hardware compatibility
_AXES = ("--batch", "--views", "--height", "--width")
# Of RULES: a file of one machine, what no command line sets, and what no runtime of this version loads.
_NOT_FLAGS = ("timing_cache", "tf32", "strip_weights")


def load_faults(
    record: EngineRecord, *, version: str | None, gpus: Sequence[Capability], plugin: str | None = None
) -> list[str]:
    """Everything in an engine's record that speaks against loading it; empty where nothing does.

    version   of the installed library of its builder; None where there is none to compare with
    gpus      compute capabilities of which one has to fit; empty where there is none to compare with
    plugin    SHA-256 of the plugin library that is given, None for none

    A file's size and digest are not its record's: `checked_plan` checks them as well.
    """
    faults = []
    name = installed.title(record.builder)
    if version is not None and not loads_version(record, version):
        later = " for later ones" if is_version_compatible(record) else ""
        faults.append(f"built by {name} {record.builder_version}{later}, here is {version}")
    if fault := _plugin_fault(record, plugin):
        faults.append(fault)
    if _asked(record, "strip_weights"):
        faults.append("it has no weights (--strip-weights), and this version puts none in")
    if gpus and not any(runs_on(record, gpu) for gpu in gpus):
        built_for = ", ".join(_shown(pair) for pair in _targets(record))
        if _asked(record, "hardware_compatible"):
            built_for += f" and every GPU from {_shown(_OLDEST_COMPATIBLE_GPU)} on but Jetson's"
        here = ", ".join(_shown(gpu) for gpu in sorted(set(gpus)))
        faults.append(f"built for compute capability {built_for}, the GPUs here have {here}")
    return faults


def plugin_digest(record: EngineRecord) -> str | None:
    """SHA-256 of the plugin library that an engine needs; None for one that needs none, or does not say which."""
    digest = (record.plugin or {}).get("sha256")
    return digest if isinstance(digest, str) and digest else None


def _plugin_fault(record: EngineRecord, given: str | None) -> str | None:
    """An engine's plugin library is never part of a bundle: whoever loads it names the very library."""
    if record.plugin is None:
        return f"it needs no plugin library, and one is given (SHA-256 {given}): leave it out" if given else None
    if record.builder == "tensorrt-rtx":
        return "it needs a plugin library, and TensorRT-RTX takes none"
    needed = plugin_digest(record)
    if needed is None:
        return "it needs a plugin library, and its record does not say which"
    if given is None:
        return f"it needs the plugin library of SHA-256 {needed}, and none is given: give it (docs/plugin.md)"
    if given != needed:
        return f"it was built with the plugin library of SHA-256 {needed}, the given one has {given}: give that one"
    return None


def loads_version(record: EngineRecord, version: str) -> bool:
    """Whether this version of the record's builder loads its engine.

    All four numbers have to be the same; what follows them (post1, +cuda13) does not count. A version-compatible engine
    of TensorRT loads in the same or a later version of its major version, and one of 10 in 11. No two releases of
    TensorRT-RTX load each other's.
    """
    built, here = version_of(record.builder_version), version_of(version)
    if not built or not here:
        return False
    if not is_version_compatible(record):
        return built == here
    return here >= built and (built[0], here[0]) in {(built[0], built[0]), (10, 11)}


def runs_on(record: EngineRecord, gpu: Capability) -> bool:
    """Whether the engine was built for a GPU of this compute capability.

    TensorRT-RTX builds for a list, TensorRT for one GPU; a hardware-compatible engine of TensorRT is for every GPU from
    8.0 on, those of Jetson excepted.
    """
    if gpu in _targets(record):
        return True
    compatible = record.builder == "tensorrt" and _asked(record, "hardware_compatible")
    return compatible and gpu >= _OLDEST_COMPATIBLE_GPU and not _JETSON.intersection((gpu, *_targets(record)))


def is_version_compatible(record: EngineRecord) -> bool:
    """Whether the engine was built for later versions, too: it brings code for the host, which runs as it loads."""
    return record.builder == "tensorrt" and _asked(record, "version_compatible")


def checked_plan(
    bundle: Bundle,
    record: EngineRecord,
    *,
    version: str | None,
    gpus: Sequence[Capability],
    plugin: PluginLibrary | None = None,
) -> bytes:
    """The bytes of an engine that nothing speaks against: the way from a bundle to a deserialiser.

    version, gpus   as of `load_faults`
    plugin          the library that is given for it

    Raises EngineError, in one line with the command that rebuilds the engine, for one of another version, GPU or plugin
    library, or that is missing or damaged; InputError for a record of another bundle.
    """
    path, entry = bundle.engine_path(record), bundle.manifest.files[record.file]
    command = rebuild_command(bundle.path, record, gpus, plugin=plugin.path if plugin else None)
    digest = plugin.sha256 if plugin else None
    if faults := load_faults(record, version=version, gpus=gpus, plugin=digest):
        raise EngineError(f"{path} cannot be used here: {'; '.join(faults)}; build it again: {command}")
    try:
        check_file(bundle.path, record.file, entry, digest=False)
        plan = path.read_bytes()
    except BundleError as error:
        raise EngineError(f"{str(error).rpartition('; ')[0]}; build it again: {command}") from None
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror}; or build it again: {command}") from None
    if hashlib.sha256(plan).hexdigest() != entry.sha256:  # of these very bytes: the file may change meanwhile
        raise EngineError(f"{path} is damaged: its SHA-256 is not the manifest's; build it again: {command}")
    return plan


def rebuild_command(
    bundle: str | os.PathLike[str],
    record: EngineRecord,
    gpus: Sequence[Capability] = (),
    *,
    plugin: Path | None = None,
) -> str:
    """The command that builds an engine of the same shapes and flags for `gpus`, or for what the record names.

    One of TensorRT-RTX keeps its GPUs and gets those of `gpus`; where it builds for none of these, it is TensorRT's.
    An engine with a plugin is built with the library `plugin`, or with the file whose name the record has.
    """
    builder, targets = record.builder, set(_targets(record)).intersection(RTX_TARGETS)
    if builder == "tensorrt-rtx" and gpus:
        targets.update(set(gpus).intersection(RTX_TARGETS))
        builder = "tensorrt-rtx" if targets.intersection(gpus) else "tensorrt"
    words = ["moe3d-export", os.fspath(bundle), "--builder", builder]
    words += [*(("--part", record.part) if record.part else ()), *_shape_words(record.profiles)]
    if builder == "tensorrt-rtx" and targets not in (set(), set(RTX_CAPABILITIES)):
        words += ["--target", ",".join("sm{}{}".format(*pair) for pair in sorted(targets))]
    words += [*_flag_words(record, builder), *_plugin_words(record, builder, plugin)]
    return shlex.join([*words, *(word for name in accepted_findings(record) for word in ("--accept", name))])


def _shape_words(profiles: Sequence[Profile]) -> Iterator[str]:
    for axis, flag in enumerate(_AXES):
        ranges = [(profile.min[axis], profile.opt[axis], profile.max[axis]) for profile in profiles]
        texts = [str(low) if low == high else f"{low}:{typical}:{high}" for low, typical, high in ranges]
        if flag == "--batch" and set(texts) == {"1"}:
            continue  # the default
        for text in texts if len(set(texts)) > 1 else texts[:1]:
            yield from (flag, text)


def _flag_words(record: EngineRecord, builder: str) -> Iterator[str]:
    """What was asked of the builder, as far as `builder` has it."""
    for name, rule in RULES.items():
        value = _flags(record).get(name)
        if name in _NOT_FLAGS or rule.since(builder) is None:
            continue
        if name == "workspace_bytes" and type(value) is int and value > 0:
            yield from (rule.flag, _size(value))
        elif name == "optimization_level" and type(value) is int:
            yield from (rule.flag, str(value))
        elif value is True:
            yield rule.flag


def _plugin_words(record: EngineRecord, builder: str, plugin: Path | None) -> Iterator[str]:
    if record.plugin is not None and builder == "tensorrt":
        named = record.plugin.get("library")
        file = plugin or (named if isinstance(named, str) and named else "libmoe3d_plugin_trt*.so")
        yield from ("--plugin", os.fspath(file))


def accepted_findings(record: EngineRecord) -> dict[str, str]:
    """What stands in an engine's audit because it was accepted: name -> text; a manifest says anything."""
    findings = record.audit.get("findings")
    rows = [row for row in findings if isinstance(row, dict)] if isinstance(findings, list) else []
    pairs = ((row.get("name"), row.get("text")) for row in rows if row.get("accepted") is True)
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _size(count: int) -> str:
    """Bytes in the largest unit that divides them, at least whole K."""
    for unit, power in (("G", 30), ("M", 20)):
        if count % 2**power == 0:
            return f"{count >> power}{unit}"
    return f"{-(-count // 1024)}K"


def _flags(record: EngineRecord) -> dict[str, Any]:
    """`build.flags`; a manifest says anything, and what is no object asks for nothing."""
    flags = record.build.get("flags")
    return flags if isinstance(flags, dict) else {}


def _asked(record: EngineRecord, flag: str) -> bool:
    return _flags(record).get(flag) is True


def _targets(record: EngineRecord) -> tuple[Capability, ...]:
    return tuple(divmod(number, 10) for number in record.compute_capabilities)


def _shown(gpu: Capability) -> str:
    return "{}.{}".format(*gpu)
