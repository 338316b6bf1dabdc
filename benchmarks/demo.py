"""`make demo`: a seeded moe3d-tiny checkpoint -> verified bundle with an engine -> depth of two photographs.

Each step is the command a user would type, run as it is and printed. The photographs are the stereo pair "motorcycle"
of Middlebury 2014 that scikit-image's wheel carries.
"""

import shlex
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import click

from moe3d_deploy.cli.main import finish
from moe3d_deploy.errors import InputError, Moe3dError

_MARK = ".moe3d-demo"  # a folder with this file is the demo's own, to be replaced

PHOTOGRAPHS = ("motorcycle_left.png", "motorcycle_right.png")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
def main(out: Path) -> None:
    """Run the demo into the folder OUT; what an earlier run left there goes."""
    started = time.perf_counter()
    photographs = _photographs()
    if out.exists():
        if not (out / _MARK).is_file():
            raise InputError(f"{out} exists and is not an earlier demo; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / _MARK).touch()
    checkpoint, bundle, results = (str(out / name) for name in ("moe3d-tiny", "bundle", "results"))
    expert_outputs = "expert_weights,expert_entropy"
    _run("convert", "moe3d-tiny", "-o", checkpoint)
    _run("export", checkpoint, "-o", bundle, "--precision", "fp16", "--outputs", expert_outputs, "--views", "1:2:4")
    _run("inspect", bundle)
    _run("run", bundle, *photographs, "-o", results)
    click.echo(f"\nDone in {time.perf_counter() - started:.0f} s. The weights are seeded noise: the depth is not real.")
    click.echo(f"bundle       {bundle}   (copy it to another machine and run it there)")
    click.echo(f"results      {results}   (depth, confidence and expert maps, cameras.json, points.ply, points.glb)")


def _photographs() -> list[str]:
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise InputError("scikit-image, whose photographs the demo uses, is not installed: make setup")
    folder = Path(package.origin).parent / "data"
    return [str(folder / name) for name in PHOTOGRAPHS]


def _run(*arguments: str) -> None:
    click.echo(f"\n$ moe3d {shlex.join(arguments)}")
    if subprocess.run([sys.executable, "-m", "moe3d_deploy", *arguments], check=False).returncode:
        raise Moe3dError(f"moe3d {arguments[0]} failed, see above")


if __name__ == "__main__":
    sys.exit(finish("demo", lambda: main))
