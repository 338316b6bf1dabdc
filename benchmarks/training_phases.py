"""What a training was, phase by phase, from the folders of its runs: options, steps, samples, hours; and as a table."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

from moe3d_deploy.errors import InputError
from moe3d_deploy.training.logs import read_log
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.run_folder import OPTIONS_FILE

_NOT_SAID = ("source", "seed", "steps", "licence")  # have columns or sentences of their own


def phase(run: Path) -> dict[str, Any]:
    """The options of a run in the folder `run`, how far it came, and how long that took on its machine.

    seconds   of training, without the start, from the log: between its lines samples come at the rate that they tell
    Raises InputError for a folder that is no run, CheckpointError for options of another version, OSError.
    """
    log = run / "train.jsonl"
    if not log.is_file() or not (run / OPTIONS_FILE).is_file():
        raise InputError(f"{run}: no run of moe3d train, which has options.json and train.jsonl; check the path")
    options = TrainOptions.read(run / OPTIONS_FILE)
    lines = [{"samples": 0}, *read_log(log, "step")]
    if len(lines) == 1:
        raise InputError(f"{run}: its log has no step yet; train it first")
    seconds = sum((now["samples"] - past["samples"]) / now["samples_per_second"] for past, now in pairwise(lines))
    told = {"steps": lines[-1]["step"], "samples": lines[-1]["samples"], "seconds": round(seconds)}
    return {"options": options.to_dict(), **told}


def phases_table(facts: dict[str, Any]) -> str:
    """The phases in `training.phases` of a shipped model's JSON, in Markdown, with their sum."""
    training = facts["training"]
    phases = training["phases"]
    rows = ["| phase | steps | samples | hours | options |", "|---|---:|---:|---:|---|"]
    for number, found in enumerate(phases, 1):
        rows.append(f"| {number} | {_amounts(found)} | {_flags(found['options'])} |")
    total = {key: sum(found[key] for found in phases) for key in ("steps", "samples", "seconds")}
    rows.append(f"| all | {_amounts(total)} | |")
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
