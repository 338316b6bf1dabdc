"""What matrix products in 8 bits would win in ONNX Runtime on a CPU, and what they would cost in depth.

    python -m moe3d_deploy.benchmarks.eight_bit BUNDLE --out benchmarks/results/eight_bit_cpu.json

Speed: the four products of a transformer block of `--like`, for one view, in float32 and in every form of
`eight_bit_products`, in turns in one process. Depth: the products of all blocks of BUNDLE's encoder and aggregator
changed to a form, all kinds or one, on held-out scenes against the bundle as it is.
"""

import json
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from numpy.typing import NDArray

from moe3d_deploy.benchmarks.eight_bit_products import FLOAT32, FORMS, chain, in_eight_bits
from moe3d_deploy.benchmarks.environment import environment
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.cli.parameters import OutputFile
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.costs import Sizes
from moe3d_deploy.errors import InputError
from moe3d_deploy.evaluation import evaluate, native_size, rendered_scenes
from moe3d_deploy.evaluation.compare import compare
from moe3d_deploy.evaluation.evaluate import Evaluation
from moe3d_deploy.evaluation.scenes import HELD_OUT
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.files import atomic_write
from moe3d_deploy.machine import usable_cores
from moe3d_deploy.runtime.onnx_operators import for_onnxruntime
from moe3d_deploy.runtime.packages import load_package

FORMAT_VERSION = 1
VIEW = (1, 1, 518, 392)  # B, S, H, W of the products that are timed
KINDS = ("qkv", "proj", "fc1", "fc2")
ALL = "all"
_BLOCKS_TIMED = 2  # so that no weight is still in a cache from its last use
_BIAS = re.compile(r"\.aggregator\.(?:patch_embed\.blocks|frame_blocks|global_blocks)\.\d+\.(?:attn|mlp)\.(\w+)\.bias$")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=OutputFile(), help="JSON file to write.")
@click.option("--like", default="moe3d-1b", show_default=True, help="Checkpoint or preset whose products are timed.")
@click.option("--runs", type=click.IntRange(min=3), default=15, show_default=True, help="Of each form.")
@click.option("--count", type=click.IntRange(min=1), default=32, show_default=True, help="Scenes.")
@click.option("--views", type=click.IntRange(1, 8), default=4, show_default=True)
def main(bundle: Path, out: Path, like: str, runs: int, count: int, views: int) -> None:
    """Measure products in 8 bits, and the depth of BUNDLE, of one file in float32, with them."""
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    if manifest.precision != "fp32" or manifest.parts:
        raise InputError(f"{bundle} is not one file in float32; export it with --precision fp32 and without --split")
    config = ModelConfig.from_dict(manifest.model_config)
    height, width = native_size(config.img_size, config.patch_size)
    scenes = {"split": HELD_OUT[0], "count": count, "views": views, "height": height, "width": width}
    report = {
        "format_version": FORMAT_VERSION,
        "environment": environment(),
        "products": {"model": like, "shape": VIEW, **time_products(SourceSpec(like).open().config, runs)},
        "depth": {"model": manifest.name, "scenes": scenes, "rows": list(depth_rows(opened, scenes))},
    }
    atomic_write(out, (json.dumps(report, indent=2, sort_keys=True) + "\n").encode())


def time_products(config: ModelConfig, runs: int) -> dict[str, Any]:
    """Seconds of each form for the four products of one block, of one view, the median of `runs`; and how many blocks.

    Every form runs once in every round, on the same new activations, after two rounds that do not count.
    """
    dim, ratio = config.aggregator.embed_dim, int(config.aggregator.mlp_ratio)
    sizes = {"qkv": (dim, 3 * dim), "proj": (dim, dim), "fc1": (dim, ratio * dim), "fc2": (ratio * dim, dim)}
    rng = np.random.default_rng(0)
    weights = [
        (f"x{rows}", f"{kind}{block}", rng.standard_normal((rows, columns), np.float32) * np.float32(rows**-0.5))
        for block in range(_BLOCKS_TIMED) for kind, (rows, columns) in sizes.items()
    ]  # fmt: skip
    inputs = {f"x{rows}": rows for rows, _ in sizes.values()}
    sessions = {form: _session(chain(form, weights, inputs)) for form in (FLOAT32, *FORMS)}
    tokens = Sizes.of(config, VIEW).tokens_with(config.aggregator.num_register_tokens)
    seconds: dict[str, list[float]] = {form: [] for form in sessions}
    for _ in range(2 + runs):
        given = {name: rng.standard_normal((tokens, rows), np.float32) for name, rows in inputs.items()}
        for form, session in sessions.items():
            start = time.perf_counter()
            session.run(None, given)
            seconds[form].append((time.perf_counter() - start) / _BLOCKS_TIMED)
    return {
        "tokens": tokens,
        "blocks": config.vit.depth + 2 * config.aggregator.depth,
        "flops": 2 * tokens * sum(rows * columns for rows, columns in sizes.values()),
        "runs": runs,
        "threads": usable_cores(),
        "seconds": {form: statistics.median(times[2:]) for form, times in seconds.items()},
    }


def depth_rows(bundle: Bundle, scenes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for every form and kind of product: what changes against the bundle as it is.

    products    how many were changed
    rms         of predicted depth over the bundle's depth, minus 1, over all pixels
    changes     of the scenes' figures, as `Comparison` tells them
    """
    pick = dict(scenes)
    count = pick.pop("count")
    whole = onnx.load(bundle.model_path)
    rendered = list(rendered_scenes(range(count), **pick))
    reference, depths = _judged(whole, rendered)
    for form in FORMS:
        for kind in (ALL, *KINDS):
            model = onnx.ModelProto()
            model.CopyFrom(whole)
            changed = in_eight_bits(model, form, partial(_is_of, kind))
            if not changed:
                raise InputError(f"{bundle.path} has no product {kind} with a bias of its name; export it again")
            found, others = _judged(model, rendered)
            squares = [
                np.square(other / depth - 1, dtype=np.float64) for other, depth in zip(others, depths, strict=True)
            ]
            yield {
                "form": form,
                "kind": kind,
                "products": changed,
                "rms": float(np.sqrt(np.mean(squares))),
                "changes": {key: change._asdict() for key, change in compare(reference, found).changes.items()},
            }


def table(report: dict[str, Any]) -> str:
    """The time of a block's products, then what the depth loses, as Markdown."""
    products, depth = report["products"], report["depth"]
    exact = products["seconds"][FLOAT32]
    lines = [
        f"| products of a block of {products['model']}, one view | time | GFLOP/s | of float32's time |",
        "|---|---:|---:|---:|",
    ]
    for form in (FLOAT32, *FORMS):
        seconds = products["seconds"][form]
        rate = products["flops"] / seconds / 1e9
        lines.append(f"| {form} | {1e3 * seconds:.1f} ms | {rate:.0f} | {seconds / exact:.2f} |")
    lines += [
        "",
        f"All {products['blocks']} blocks hold {products['blocks'] * exact:.1f} s of these products in float32.",
        "",
        f"| products of {depth['model']} in 8 bits | form | rms of depth | AbsRel | boundary F1 |",
        "|---|---|---:|---:|---:|",
    ]
    for row in depth["rows"]:
        changes = row["changes"]
        lines.append(
            f"| {row['kind']} ({row['products']}) | {row['form']} | {100 * row['rms']:.2f} % "
            f"| {100 * changes['abs_rel']['change']:+.2f} % | {changes['boundary_f1']['change']:+.4f} |"
        )
    return "\n".join(lines)


def _judged(model: onnx.ModelProto, scenes: Sequence[Any]) -> tuple[Evaluation, list[NDArray[np.float32]]]:
    """The model's figures on the scenes, and its depth of each."""
    session, depths = _session(model), []
    names = [output.name for output in session.get_outputs()]

    def predict(images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        arrays = session.run(None, {"images": images[None]})
        result = {name: array[0] for name, array in zip(names, arrays, strict=True)}
        depths.append(result["depth"])
        return result

    return evaluate(predict, scenes, points=False), depths


def _is_of(kind: str, bias: str) -> bool:
    match = _BIAS.search(bias)
    return match is not None and kind in (ALL, match[1])


def _session(model: onnx.ModelProto) -> Any:
    """With ONNX Runtime's defaults: it repacks the weights, as 8 bits need it."""
    ort = load_package("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    file = for_onnxruntime(model.SerializeToString())
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
