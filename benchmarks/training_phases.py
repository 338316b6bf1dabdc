"""What a training was, phase by phase, from the folders of its runs: options, steps, samples, hours; and as a table."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from moe3d_deploy.benchmarks.environment import without_paths
from moe3d_deploy.checkpoint import preset_name
from moe3d_deploy.errors import InputError
from moe3d_deploy.shipped_weights import shipped_weights
from moe3d_deploy.training.logs import read_log
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.run_folder import OPTIONS_FILE, RunFolder
from moe3d_deploy.training.state import states, step_of

_NOT_SAID = ("source", "seed", "steps", "licence")  # have columns or sentences of their own


def phase(run: Path) -> dict[str, Any]:
    """The options of a run in the folder `run`, how far it came, and how long that took on its machine.

    steps     of the newest state, so of the checkpoint; of a folder without states those that the log knows
    seconds   of training, without the start, from the log: between its lines samples come at the rate that they tell
    options   without the folders of this machine

    Raises InputError for a folder that is no run, CheckpointError for options of another version, OSError.
    """
    log = run / "train.jsonl"
    if not log.is_file() or not (run / OPTIONS_FILE).is_file():
        raise InputError(f"{run}: no run of moe3d train, which has options.json and train.jsonl; check the path")
    options = TrainOptions.read(run / OPTIONS_FILE)
    lines = read_log(log, "step")
    if not lines:
        raise InputError(f"{run}: its log has no step yet; train it first")
    saved = states(RunFolder(run).state)
    last = step_of(saved[-1]) if saved else lines[-1]["step"]
    end = last * options.batch
    samples = [0, *(min(line["samples"], end) for line in lines), end]
    rates = [line["samples_per_second"] for line in [*lines, lines[-1]]]
    seconds = sum((now - past) / rate for (past, now), rate in zip(pairwise(samples), rates, strict=True))
    told = {"steps": last, "samples": end, "seconds": round(seconds)}
    kept = {key: without_paths(value) if isinstance(value, str) else value for key, value in options.to_dict().items()}
    return {"options": kept, **told}


def phases_behind(source: str | Path) -> list[dict[str, Any]]:
    """The phases that led to weights, oldest first: of a preset's trained ones, or of the checkpoint of a run.

    Before the phase of a run come those of what it started from, and so on; those before --from-scratch do not count.
    Weights that no run has written have none. Raises as `phase`; InputError where the source of a run is gone.
    """
    if preset := preset_name(source):
        shipped = shipped_weights(preset)
        return [] if shipped is None else shipped.training.get("phases", [])
    folder = Path(source).resolve()
    run = (folder.parent if folder.is_file() else folder).parent
    if not (run / OPTIONS_FILE).is_file():
        return []
    options, own = TrainOptions.read(run / OPTIONS_FILE), phase(run)
    before = options.source
    if options.from_scratch:
        return [own]
    if preset_name(before) is None and not Path(before).exists():
        raise InputError(f"{run}: it started from {before}, which is gone; put it back, or name every --phase")
    # What a preset ships by now may hold this run, or an earlier state of it: only what was there before counts.
    return [*takewhile(lambda found: not _is_of(found, own), phases_behind(before)), own]


def totals(phases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Steps, samples and seconds of all phases together."""
    return {key: sum(found[key] for found in phases) for key in ("steps", "samples", "seconds")}


def _is_of(found: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether a phase is `own`, or that as it once was; the same command run a second time takes another time."""
    return found["options"] == own["options"] and (found["steps"] < own["steps"] or found == own)


def phases_table(facts: dict[str, Any]) -> str:
    """The phases in `training.phases` of a shipped model's JSON, in Markdown, with their sum."""
    training = facts["training"]
    phases = training["phases"]
    rows = ["| phase | steps | samples | hours | options |", "|---|---:|---:|---:|---|"]
    for number, found in enumerate(phases, 1):
        rows.append(f"| {number} | {_amounts(found)} | {_flags(found['options'])} |")
    rows.append(f"| all | {_amounts(totals(phases))} | |")
    return "\n".join([*rows, "", f"On {training['machine']}."])


def _amounts(found: dict[str, Any]) -> str:
    return f"{found['steps']:,} | {found['samples']:,} | {found['seconds'] / 3600:.1f}"


def _flags(values: dict[str, Any]) -> str:
    """The flags of `moe3d train` that were not the default, but for those that change nothing in the result."""
    options = TrainOptions.from_dict(values)
    said = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in _NOT_SAID or field.metadata.get("any_time") or value == field.default:
            continue
        flag = "--" + field.name.replace("_", "-")
        switch = {True: flag, False: flag.replace("--", "--no-", 1)}
        said.append(switch[value] if isinstance(value, bool) else f"{flag} {_text(field.name, value)}")
    return f"`--seed {options.seed} {' '.join(said)}`"


def _text(name: str, value: Any) -> str:
    if name == "shapes":
        return ",".join(f"{height}x{width}" for height, width in value)
    if isinstance(value, tuple):
        return ":".join(f"{item:g}" for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
