"""`make demo`: moe3d-tiny -> verified bundle with an engine -> depth of scenes it has never seen, beside the truth.

Each step is the command a user would type, run as it is and printed. One scene is rendered, of kinds of objects that
training never shows; the other is the stereo pair "motorcycle" of Middlebury 2014, with its measured depth.
"""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

from moe3d_deploy.benchmarks import motorcycle
from moe3d_deploy.cli.main import finish
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.evaluation.folder import TRUTH_FILE
from moe3d_deploy.metrics import align_median, depth_errors

_MARK = ".moe3d-demo"  # a folder with this file is the demo's own, to be replaced
SEED = 3  # of the rendered scene


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
def main(out: Path) -> None:
    """Run the demo into the folder OUT; what an earlier run left there goes."""
    started = time.perf_counter()
    if out.exists():
        if not (out / _MARK).is_file():
            raise InputError(f"{out} exists and is not an earlier demo; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / _MARK).touch()
    scene = out / "motorcycle"
    motorcycle.write_scene(scene)
    photographs = [str(scene / name) for name in motorcycle.PHOTOGRAPHS]
    checkpoint, bundle, drawn, results = (str(out / name) for name in ("moe3d-tiny", "bundle", "drawn", "results"))
    _run("convert", "moe3d-tiny", "-o", checkpoint)
    _run("export", checkpoint, "-o", bundle, "--precision", "fp16", "--outputs", "expert_weights,expert_entropy",
         "--views", "1:2:4")  # fmt: skip
    _run("inspect", bundle)
    _run("run", bundle, *photographs, "-o", results)
    _run("eval", bundle, "--scenes", "test-kinds", "--first-seed", str(SEED), "--count", "1", "--pictures", drawn)
    _run("eval", bundle, "--data", str(scene), "--pictures", drawn)
    click.echo(f"A flat wall in place of the motorcycle would have an AbsRel of {_flat_error(scene):.4f}.")
    click.echo(f"\nDone in {time.perf_counter() - started:.0f} s.")
    click.echo(f"bundle       {bundle}   (copy it to another machine and run it there)")
    click.echo(f"drawn        {drawn}   (truth beside prediction: depth, error, experts; the points from above)")
    click.echo(f"results      {results}   (depth, confidence and expert maps, cameras.json, points.ply, points.glb)")


def _flat_error(scene: Path) -> float:
    """AbsRel of one depth for all pixels, after the scale that every prediction gets."""
    with np.load(scene / TRUTH_FILE) as file:
        depth = file["depth"]
    valid, flat = depth > 0, np.ones_like(depth)
    return depth_errors(flat * align_median(flat, depth, valid), depth, valid).abs_rel


def _run(*arguments: str) -> None:
    click.echo(f"\n$ moe3d {shlex.join(arguments)}")
    if subprocess.run([sys.executable, "-m", "moe3d_deploy", *arguments], check=False).returncode:
        raise Moe3dError(f"moe3d {arguments[0]} failed, see above")


if __name__ == "__main__":
    sys.exit(finish("demo", lambda: main))
