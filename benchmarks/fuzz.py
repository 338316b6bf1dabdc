"""Fuzz one reader with atheris (libFuzzer) for some seconds, in a process of its own.

    python -m moe3d_deploy.benchmarks.fuzz --target manifest --seconds 60 --checkpoint C --bundle B --out FILE

Only this project's modules are instrumented; atheris comes with none of the extras: pip install atheris.
"""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import click

from moe3d_deploy.benchmarks.environment import without_paths
from moe3d_deploy.cli.main import finish
from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.files import atomic_write

_SLOW_SECONDS = 5.0  # an input that takes longer is a finding: a small file must not cost a robot its time
_FINDINGS_KEPT = 20
_INPUT_KEPT = 2000  # bytes of an input that a finding keeps
_MEMORY_MIB = 4096
_MODULE = "moe3d_deploy.benchmarks.fuzz"
TARGETS = ("manifest", "external data", "safetensors", "checkpoint config", "images", "engine shapes", "bundle")


def fuzz(name: str, seconds: float, checkpoint: Path, bundle: Path, *, seed: int = 1) -> dict[str, Any]:
    """Fuzz target `name` (of TARGETS) and return its figures.

    inputs, accepted, refusals (distinct ones), seconds, and findings: what was neither accepted nor refused, each with
    the input in hex. Raises Moe3dError where atheris is not installed.
    """
    if importlib.util.find_spec("atheris") is None:
        raise Moe3dError("atheris is not installed: pip install atheris")
    with tempfile.TemporaryDirectory(prefix="moe3d-fuzz-") as folder:
        out = Path(folder) / "result.json"
        arguments = ["--target", name, "--seconds", str(seconds), "--seed", str(seed), "--out", str(out)]
        command = [sys.executable, "-m", _MODULE, *arguments, "--checkpoint", str(checkpoint), "--bundle", str(bundle)]
        # where it keeps an input that ends the process
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
        result = json.loads(out.read_text()) if out.exists() else _empty()
        if run.returncode:
            last = (run.stderr.strip().splitlines() or [""])[-1]
            kept = sorted([*Path(folder).glob("crash-*"), *Path(folder).glob("timeout-*"), *Path(folder).glob("oom-*")])
            data = kept[0].read_bytes()[:_INPUT_KEPT].hex() if kept else ""
            what = f"the process ended with code {run.returncode}: {without_paths(last)}"
            result["findings"].append({"what": what, "input": data})
    return result


def _empty() -> dict[str, Any]:
    return {"inputs": 0, "accepted": 0, "refusals": 0, "seconds": 0.0, "findings": []}


class _Counter:
    """Counts what becomes of inputs, and ends the process when the time is over."""

    def __init__(self, call: Any, seconds: float, out: Path) -> None:
        self._call, self._out = call, out
        self._started = time.monotonic()
        self._until = self._started + seconds
        self._written = self._started
        self._inputs = self._accepted = 0
        self._refusals: set[str] = set()
        self._findings: dict[str, dict[str, str]] = {}

    def __call__(self, data: bytes) -> None:
        before = time.monotonic()
        self._inputs += 1
        try:
            self._call(data)
            self._accepted += 1
        except Moe3dError as error:
            self._refusals.add(_kind(error))
            if "\n" in str(error):
                self._find(f"an error of several lines: {_kind(error)}", data)
        except Exception as error:  # noqa: BLE001  that is what is looked for
            frame = traceback.extract_tb(error.__traceback__)[-1]
            self._find(f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}: {error}"[:300], data)
        now = time.monotonic()
        if now - before > _SLOW_SECONDS:
            self._find(f"one input took {now - before:.0f} s", data)
        if now > self._until:
            self._write(now)
            os._exit(0)  # libFuzzer would say goodbye with pages of statistics
        if now - self._written > 1:
            self._write(now)
            self._written = now

    def _find(self, what: str, data: bytes) -> None:
        place = re.sub(r": .*", "", what)
        if len(self._findings) < _FINDINGS_KEPT:
            self._findings.setdefault(place, {"what": without_paths(what), "input": data[:_INPUT_KEPT].hex()})

    def _write(self, now: float) -> None:
        result = {
            "inputs": self._inputs,
            "accepted": self._accepted,
            "refusals": len(self._refusals),
            "seconds": round(now - self._started, 1),
            "findings": list(self._findings.values()),
        }
        atomic_write(self._out, json.dumps(result).encode())


def _kind(error: Moe3dError) -> str:
    """The error without what it says of this one input: numbers, quoted text, letters in brackets."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\([^()]*\)|\[[^\]]*\]", "_", str(error))
    return f"{type(error).__name__}: {re.sub(r'[^a-zA-Z_ ]+', '', text)[:120]}"


@click.command()
@click.option("--target", "name", required=True, type=click.Choice(TARGETS))
@click.option("--seconds", type=click.FloatRange(min=0), default=60, show_default=True)
@click.option("--seed", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help="A small good checkpoint folder.")
@click.option("--bundle", required=True, type=click.Path(path_type=Path), help="The bundle exported from it.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON file for the figures.")
def main(name: str, seconds: float, seed: int, checkpoint: Path, bundle: Path, out: Path) -> None:
    """Fuzz one reader in this process."""
    atheris = importlib.import_module("atheris")

    with atheris.instrument_imports(include=["moe3d_deploy"]):
        from moe3d_deploy.benchmarks import fuzz_targets

        work = Path(tempfile.mkdtemp(prefix="work-", dir=out.absolute().parent))
        target = fuzz_targets.target(name, checkpoint.absolute(), bundle.absolute(), work)
    corpus = work / "corpus"
    corpus.mkdir()
    for index, data in enumerate(target.seeds):
        (corpus / f"seed-{index}").write_bytes(data)
    flags = ["-max_len=200000", "-timeout=60", f"-rss_limit_mb={_MEMORY_MIB}", f"-seed={seed}"]
    atheris.Setup([sys.argv[0], str(corpus), *flags], _Counter(target.call, seconds, out))
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(finish("fuzz", lambda: main))
