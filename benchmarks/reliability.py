"""The survival matrix with its campaigns, measured: the survival tests, kills at random moments, fuzzed readers.

    python -m moe3d_deploy.benchmarks.reliability --out benchmarks/results/reliability_cpu.json

docs/reliability.md is made of the result. Needs a checkout, and atheris for the fuzzing.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from moe3d_deploy.benchmarks.commands import MOE3D
from moe3d_deploy.benchmarks.environment import environment, without_paths
from moe3d_deploy.benchmarks.fuzz import TARGETS, fuzz
from moe3d_deploy.benchmarks.kill_campaign import Campaign, kill_builds, kill_exports
from moe3d_deploy.benchmarks.survival_table import environment_of
from moe3d_deploy.cli.main import finish
from moe3d_deploy.cli.parameters import OutputFile
from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "kills", "fuzz")
FORMAT_VERSION = 2

# Every kind of layer once, so that an export takes seconds.
_CONFIG = {
    "img_size": 42,
    "patch_size": 14,
    "vit": {"embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0, "num_register_tokens": 2},
    "aggregator": {"embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0, "num_register_tokens": 2},
    "camera_head": {"dim_in": 64, "trunk_depth": 1, "num_heads": 2, "num_iterations": 2},
    "dpt_head": {"dim_in": 64, "features": 16, "out_channels": [8] * 4, "intermediate_layer_idx": [0] * 4},
    "moe": {"num_experts": 2, "hidden_channels": 4, "gate_hidden_channels": 4, "temperature": 0.5},
    "point_head": True,
}


@click.command()
@click.option("--out", required=True, type=OutputFile(), help="JSON file; parts that do not run stay in it.")
@click.option("--only", multiple=True, type=click.Choice(PARTS), help="A part; may be repeated.  [default: all]")
@click.option("--kills", type=click.IntRange(min=1), default=30, show_default=True, help="Of exports, and of builds.")
@click.option("--fuzz-seconds", type=click.FloatRange(min=1), default=120, show_default=True, help="For each reader.")
@click.option("--seed", type=click.IntRange(min=1), default=1, show_default=True)
def main(out: Path, only: tuple[str, ...], kills: int, fuzz_seconds: float, seed: int) -> None:
    """Run the survival tests, the kill campaigns and the fuzz campaigns, and write what came of them."""
    report = _earlier(out)
    facts = environment()
    seconds: dict[str, float] = report.setdefault("seconds", {})
    faults: list[str] = []

    def keep(part: str, started: float) -> None:
        seconds[part] = round(time.perf_counter() - started, 1)
        report["environments"][part] = facts
        text = json.dumps(_portable(report), indent=2, sort_keys=True)
        atomic_write(out, (text + "\n").encode("utf-8"))

    with tempfile.TemporaryDirectory(prefix="moe3d-reliability-") as folder:
        work = Path(folder)
        for part in only or PARTS:
            started = time.perf_counter()
            _tell(f"{part} ...")
            if part == "tests":
                report["tests"], found = _run_tests(work)
            elif part == "kills":
                report["kills"], found = _run_kills(*_prepared(work), work, kills, seed)
            else:
                report["fuzz"], found = _run_fuzz(*_prepared(work), fuzz_seconds, seed)
            faults += found
            keep(part, started)
    if faults:
        raise Moe3dError(f"{len(faults)} faults: {'; '.join(faults)}")


def _earlier(out: Path) -> dict[str, Any]:
    """The report so far, each measured part with its own environment; an older file has one for all."""
    empty: dict[str, Any] = {"tests": [], "kills": {}, "fuzz": {}}
    report = empty | (json.loads(out.read_text(encoding="utf-8")) if out.exists() else {})
    found = {part: environment_of(report, part) for part in PARTS if report[part]}
    report.pop("environment", None)
    return report | {"format_version": FORMAT_VERSION, "environments": {k: v for k, v in found.items() if v}}


def _tell(line: str) -> None:
    click.echo(line, err=True)


def _portable(value: Any) -> Any:
    """The same JSON with no path of this machine in any text but the test names."""
    if isinstance(value, dict):
        return {key: item if key == "test" else _portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    return without_paths(value) if isinstance(value, str) else value


def _run_tests(work: Path) -> tuple[list[dict[str, Any]], list[str]]:
    records = work / "survival.json"
    files = sorted(f"tests/{path.name}" for path in (ROOT / "tests").glob("test_survival_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "survival", "--survival-out", str(records), *files]
    code = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode
    if code not in (0, 1) or not records.exists():  # 1: some failed, which is in the record
        raise Moe3dError(f"the survival tests did not run to their end (code {code}); see pytest's report above")
    tests = json.loads(records.read_text(encoding="utf-8"))
    return tests, [f"{test['test']} {test['outcome']}" for test in tests if test["outcome"] == "failed"]


def _prepared(work: Path) -> tuple[Path, Path]:
    """A small checkpoint and the bundle of it, made once."""
    checkpoint, bundle = work / "small", work / "bundle"
    if not bundle.exists():
        from moe3d_deploy.checkpoint import save_checkpoint, seeded_source
        from moe3d_deploy.config import ModelConfig

        save_checkpoint(seeded_source("small", ModelConfig.from_dict(_CONFIG)), checkpoint)
        command = [*MOE3D, "export", str(checkpoint), "-o", str(bundle), "--builder", "none"]
        if subprocess.run(command, cwd=work, check=False).returncode:
            raise Moe3dError("the small checkpoint cannot be exported, see above")
    return checkpoint, bundle


def _run_kills(
    checkpoint: Path, bundle: Path, work: Path, kills: int, seed: int
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    campaigns: dict[str, Callable[[Path], Campaign]] = {
        "export": lambda folder: kill_exports(checkpoint, folder, kills, seed=seed, tell=_tell),
        "engine build": lambda folder: kill_builds(bundle, folder, kills, seed=seed, tell=_tell),
    }
    results, faults = {}, []
    for name, run in campaigns.items():
        folder = work / f"kills of {name}"
        folder.mkdir()
        campaign = run(folder)
        results[name] = campaign.to_dict()
        faults += [f"{name}: {fault}" for fault in campaign.faults]
    return results, faults


def _run_fuzz(checkpoint: Path, bundle: Path, seconds: float, seed: int) -> tuple[dict[str, dict[str, Any]], list[str]]:
    results, faults = {}, []
    for name in TARGETS:
        result = fuzz(name, seconds, checkpoint, bundle, seed=seed)
        _tell(f"{name}: {result['inputs']:,} inputs, {len(result['findings'])} findings")
        results[name] = result
        faults += [f"fuzzed {name}: {finding['what']}" for finding in result["findings"]]
    return results, faults


if __name__ == "__main__":
    sys.exit(finish("reliability", lambda: main))
