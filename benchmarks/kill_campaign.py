"""Exports and engine builds that are killed (`kill -9`) at random moments, and what each one leaves.

After every kill the destination is looked at, then the same command runs to its end and has to clean up.
"""

import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe3d_deploy.benchmarks.commands import MOE3D, Command, Ended
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.errors import BundleError, Moe3dError
from moe3d_deploy.manifest import MANIFEST_NAME

_BUNDLE = "bundle"
_ENGINE_FLAGS = ("--views", "1:2:4", "--no-cache")
_STAGE = re.compile(r"\x1b\[2K(\w+) ")  # of a progress bar; within the export, of its phases
_PHASE = re.compile(r"\x1b\[2Kexport .* s  (\w+)")
Tell = Callable[[str], None]


@dataclass
class Campaign:
    """Kills of one kind: how many, when, in which stage, what was left, and everything that should not have been.

    stray   files, locks and processes that were still there after the next run
    """

    whole_seconds: float
    moments: list[float] = field(default_factory=list)
    stages: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    next_succeeded: int = 0
    stray: int = 0
    faults: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, of a campaign with at least one kill."""
        return {
            "kills": len(self.moments),
            "moments": [round(min(self.moments), 2), round(max(self.moments), 2)],
            "whole_seconds": round(self.whole_seconds, 2),
            "stages": dict(sorted(self.stages.items())),
            "left": dict(sorted(self.left.items())),
            "next_succeeded": self.next_succeeded,
            "stray": self.stray,
            "faults": self.faults,
        }


def kill_exports(
    source: Path,
    work: Path,
    kills: int,
    *,
    program: Sequence[str] = (*MOE3D, "export"),
    flags: Sequence[str] = (),
    next_flags: Sequence[str] = ("--no-verify",),
    seed: int = 0,
    tell: Tell = lambda line: None,
    environment: dict[str, str] | None = None,
) -> Campaign:
    """Kill exports of `source`, half of them with an old bundle to replace. `work` is an empty folder.

    program      `moe3d export`, or a stand-in for it
    flags        further ones of the export that is killed
    next_flags   those of the export after it, whose verification would show nothing more
    """
    folder = work / "folder"
    folder.mkdir()
    arguments = [str(source), "-o", _BUNDLE, "--builder", "none"]

    def start(*more: str, terminal: bool = False) -> Command:
        return Command([*arguments, *more], folder, work, program=program, terminal=terminal, environment=environment)

    whole = _to_its_end(start(*flags))
    campaign, dice = Campaign(whole.seconds), random.Random(seed)
    for index in range(kills):
        replacing = index % 2 == 1
        if not replacing:
            shutil.rmtree(folder / _BUNDLE)
        before = _manifest(folder) if replacing else b""
        _kill(start("--overwrite", *flags, terminal=True), dice, campaign)
        state = _state(folder, before, campaign)
        if not replacing and state in ("old", "aside"):
            campaign.faults.append(f"kill {index}: a bundle that was never there")
        campaign.left[state] += 1
        _next_run(start("--overwrite", *next_flags), folder, campaign)
        tell(f"export killed after {campaign.moments[-1]:.1f} s: {state}")
    return campaign


def kill_builds(
    bundle: Path, work: Path, kills: int, *, seed: int = 0, tell: Tell = lambda line: None,
    environment: dict[str, str] | None = None,
) -> Campaign:  # fmt: skip
    """Kill builds of an engine for a copy of `bundle`, half of them of one that replaces an engine."""
    folder = work / "folder"
    folder.mkdir()
    shutil.copytree(bundle, folder / _BUNDLE)

    def start(terminal: bool = False) -> Command:
        arguments = ["export", _BUNDLE, *_ENGINE_FLAGS]
        return Command(arguments, folder, work, terminal=terminal, environment=environment)

    whole = _to_its_end(start())
    campaign, dice = Campaign(whole.seconds), random.Random(seed)
    for index in range(kills):
        if index % 2 == 0:
            shutil.rmtree(folder / _BUNDLE)
            shutil.copytree(bundle, folder / _BUNDLE)
        _kill(start(terminal=True), dice, campaign)
        bundle_left = _opened(folder, campaign)
        state = "damaged" if bundle_left is None else "with" if bundle_left.manifest.engines else "without"
        campaign.left[state] += 1
        _next_run(start(), folder, campaign, engines=1)
        tell(f"build killed after {campaign.moments[-1]:.1f} s: {state}")
    return campaign


def _to_its_end(command: Command) -> Ended:
    with command:
        ended = command.wait()
    if ended.code:
        raise Moe3dError(f"without any kill it ended with code {ended.code}: {ended.error}")
    return ended


def _kill(command: Command, dice: random.Random, campaign: Campaign) -> None:
    """Kill it at a random moment of the time that a whole one takes."""
    moment = dice.uniform(0.02, 0.98) * campaign.whole_seconds
    started = time.monotonic()
    with command:
        while command.running() and time.monotonic() - started < moment:
            time.sleep(0.002)
        command.send(signal.SIGKILL)
        ended = command.wait()
        said = command.said
    campaign.moments.append(moment)
    campaign.stages[_stage(said) if ended.code == 128 + signal.SIGKILL else "ended before"] += 1
    if ended.processes:
        campaign.faults.append(f"processes {ended.processes} outlived the command that was killed after {moment:.2f} s")
    if ended.temporary:
        campaign.faults.append(f"{ended.temporary} in TMPDIR after a kill at {moment:.2f} s")


def _stage(said: str) -> str:
    """The last stage that the progress bars named."""
    phases, stages = _PHASE.findall(said), _STAGE.findall(said)
    if not stages:
        return "start"
    return f"export, {phases[-1]}" if stages[-1] == "export" and phases else str(stages[-1])


def _manifest(folder: Path) -> bytes:
    return (folder / _BUNDLE / MANIFEST_NAME).read_bytes()


def _state(folder: Path, before: bytes, campaign: Campaign) -> str:
    """absent, old, new, aside, or damaged, which is a fault."""
    path = folder / _BUNDLE
    if path.exists():
        if _opened(folder, campaign) is None:
            return "damaged"
        return "old" if before and _same_folder(path, before) else "new"
    if any(entry.name.startswith(f".{_BUNDLE}.old-") for entry in folder.iterdir()):
        return "aside"
    if before:
        campaign.faults.append("the old bundle is gone")
    return "absent"


def _opened(folder: Path, campaign: Campaign) -> Bundle | None:
    """The bundle that the last kill has left; None, and a fault with its moment, where it is not whole."""
    try:
        return Bundle.open(folder / _BUNDLE)
    except BundleError as error:
        campaign.faults.append(f"after a kill at {campaign.moments[-1]:.2f} s: {error}")
        return None


def _same_folder(path: Path, before: bytes) -> bool:
    return (path / MANIFEST_NAME).read_bytes() == before


def _next_run(command: Command, folder: Path, campaign: Campaign, engines: int = 0) -> None:
    with command:
        ended = command.wait()
    if ended.code:
        campaign.faults.append(f"the next run ended with code {ended.code}: {ended.error}")
        return
    try:
        bundle = Bundle.open(folder / _BUNDLE)
    except BundleError as error:
        campaign.faults.append(f"after the next run: {error}")
        return
    if len(bundle.manifest.engines) == engines:
        campaign.next_succeeded += 1
    else:
        campaign.faults.append(f"after the next run there are {len(bundle.manifest.engines)} engines, not {engines}")
    stray = [path.name for path in folder.rglob("*") if path.name.startswith(".")]
    stray += [path.name for path in folder.iterdir() if path.name != _BUNDLE]
    count = len(stray) + len(ended.processes) + len(ended.temporary)
    campaign.stray += count
    if count:
        campaign.faults.append(f"after the next run: {stray}, {ended.processes}, {ended.temporary}")
