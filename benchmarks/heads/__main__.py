"""Depth heads compared on the same frozen features: VGGT's single head, wider ones, and experts with a gate.

    python -m moe3d_deploy.benchmarks.heads moe3d-tiny --out benchmarks/results/heads_tiny.json

Trains only the last stage of the depth head, each kind from several seeds of fresh weights, and judges all of them on
held-out scenes. The same command again goes on where a killed run was. docs/comparison.md says what is compared.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from moe3d_deploy import costs
from moe3d_deploy.benchmarks.environment import environment
from moe3d_deploy.benchmarks.heads.variants import Plan, variants
from moe3d_deploy.bundle import is_bundle
from moe3d_deploy.cli.main import finish
from moe3d_deploy.cli.parameters import OutputFile
from moe3d_deploy.errors import InputError, require
from moe3d_deploy.files import atomic_write
from moe3d_deploy.training.options import DEPTH_LOSSES

FORMAT_VERSION = 2
LEARNING_RATES = (7e-4, 2e-3, 5e-3)  # Adam's best falls with the width of a head, and these are 16 to 80 channels wide
_DEFAULT = Plan()
_COUNT = click.IntRange(min=1)


@click.command()
@click.argument("checkpoint")
@click.option("--out", required=True, type=OutputFile(), help="JSON file to write.")
@click.option("--seeds", type=_COUNT, default=6, show_default=True, help="Fresh sets of weights of each head.")
@click.option("--steps", type=_COUNT, default=_DEFAULT.steps, show_default=True)
@click.option("--batch", type=_COUNT, default=_DEFAULT.batch, show_default=True, help="Views of a step.")
@click.option("--scenes", type=_COUNT, default=_DEFAULT.scenes, show_default=True, help="Scenes to train on.")
@click.option("--count", type=_COUNT, default=_DEFAULT.judged, show_default=True, help="Scenes of each held-out split.")
@click.option("--views", type=click.IntRange(1, 8), default=_DEFAULT.views, show_default=True, help="Views of a scene.")
@click.option("--height", type=_COUNT, default=_DEFAULT.height, show_default=True, help="Pixels of a view.")
@click.option("--width", type=_COUNT, default=_DEFAULT.width, show_default=True)
@click.option(
    "--loss", "losses", multiple=True, type=click.Choice(DEPTH_LOSSES), default=("l2",), show_default=True,
    help="Depth loss; may be repeated, for a comparison with each.",
)  # fmt: skip
@click.option(
    "--learning-rate", "rates", multiple=True, type=click.FloatRange(min=0, min_open=True), default=LEARNING_RATES,
    show_default=True, help="May be repeated: each head then has the one of them that suits it best.",
)  # fmt: skip
@click.option(
    "--validation-scenes", "validation", type=_COUNT, default=_DEFAULT.validation, show_default=True,
    help="By which a head's learning rate is chosen.",
)  # fmt: skip
@click.option(
    "--entropy-weight", type=click.FloatRange(min=0, max=1e-3, min_open=True, max_open=True),
    default=_DEFAULT.entropy_weight, show_default=True, help="Of the head that is trained with the entropy loss.",
)  # fmt: skip
@click.option(
    "--workdir", type=click.Path(path_type=Path),
    help="Trained heads and their figures; a further run goes on from there.  [default: OUT with .work for its suffix]",
)  # fmt: skip
@click.option("--pictures", type=click.Path(path_type=Path), help="Folder for the pictures.  [default: that of OUT]")
def main(
    checkpoint: str,
    out: Path,
    seeds: int,
    losses: tuple[str, ...],
    rates: tuple[float, ...],
    workdir: Path | None,
    pictures: Path | None,
    count: int,
    **planned: Any,
) -> None:
    """Compare depth heads on the frozen features of CHECKPOINT, a checkpoint or preset."""
    for package in ("torch", "safetensors", "scipy"):
        require(package)
    # Before torch is imported: threads that spin while they wait take the core of the process that makes samples.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from moe3d_deploy.benchmarks.heads.comparison import HeadComparison
    from moe3d_deploy.benchmarks.heads.work import open_work
    from moe3d_deploy.checkpoint import load_model, open_checkpoint

    if is_bundle(checkpoint):
        raise InputError(f"{checkpoint} is a bundle, which holds no weights to train on; name its checkpoint instead")
    plan = Plan(judged=count, **planned)
    source = open_checkpoint(checkpoint)
    costs.check_shape(source.config, (1, plan.views, plan.height, plan.width))
    compared = variants(source.config, plan.entropy_weight)
    facts: dict[str, Any] = {
        "name": source.name,
        "origin": source.origin,
        "sha256": source.sha256(),
        "licence": source.licence,
        "experts": source.config.moe.num_experts if source.config.moe else None,
    }
    model = load_model(source, point_head=False)
    with open_work(workdir or out.with_suffix(".work"), plan, facts["sha256"]) as work:
        run = HeadComparison(model, plan, compared, _distinct(losses), _distinct(rates), seeds, work)
        run.run()
        report = {
            "format_version": FORMAT_VERSION,
            "environment": environment(),
            "model": facts,
            **run.report(facts),
            "pictures": run.draw(pictures or out.parent),
        }
        atomic_write(out, (json.dumps(report, indent=2) + "\n").encode("utf-8"))
    for found in report["comparisons"]:
        for sentence in found["finding"]:
            run.progress.line(found["loss"], sentence)


def _distinct(values: tuple[Any, ...]) -> list[Any]:
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    sys.exit(finish("heads", lambda: main))
