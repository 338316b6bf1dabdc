"""`moe3d run`: images in, depth, cameras, point clouds and pictures out."""

import json
import time
from pathlib import Path

import click


@click.command("run", short_help="Run a bundle on images or folders of them")
@click.argument("source", metavar="BUNDLE")
@click.argument("images", metavar="IMAGES...", nargs=-1, required=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option("--backend", type=click.Choice(["auto", "onnxruntime", "pytorch"]), default="auto", show_default=True)
@click.option("--mode", type=click.Choice(["crop", "pad"]), help="How photographs become views; default: the bundle's.")
@click.option(
    "--size", type=click.IntRange(min=1),
    help="Pixels of a view's width (crop) or longer side (pad); default: the bundle's.",
)  # fmt: skip
@click.option("--exif", type=click.Choice(["apply", "ignore"]), default="apply", show_default=True)
@click.option("--formats", default="png,npz,ply,glb", show_default=True, help="What to write, separated by commas.")
@click.option(
    "--drop-lowest", type=click.FloatRange(0, 1, max_open=True), default=0.25, show_default=True,
    help="Share of the least confident points left out of PLY and GLB.",
)  # fmt: skip
@click.option("--outputs", default="", help="PyTorch only: outputs beyond the default ones, separated by commas.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="PyTorch presets only.")
@click.option("--view-chunk", type=click.IntRange(min=1), help="PyTorch only: views the dense heads take at a time.")
@click.option("--allow-pickle", is_flag=True, help="PyTorch only: read a .pt checkpoint (weights only).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def run_command(
    source: str,
    images: tuple[str, ...],
    output: Path,
    backend: str,
    mode: str | None,
    size: int | None,
    exif: str,
    formats: str,
    drop_lowest: float,
    outputs: str,
    seed: int,
    view_chunk: int | None,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Run BUNDLE (or, in PyTorch, a checkpoint or preset) on IMAGES: files, folders or patterns, one scene in all.

    \b
    moe3d run bundle left.png right.png -o out
    """
    from moe3d_deploy.bundle import is_bundle
    from moe3d_deploy.images import find_images, load_images
    from moe3d_deploy.runtime.output_folder import prepare_folder
    from moe3d_deploy.runtime.outputs import check_formats, write_scene
    from moe3d_deploy.runtime.session import Session

    kinds = [kind.strip() for kind in formats.split(",")]
    check_formats(kinds)
    paths = find_images(images)
    started = time.perf_counter()
    session = Session.open(
        source,
        backend=backend,
        outputs=[name.strip() for name in outputs.split(",") if name.strip()],
        seed=seed,
        allow_pickle=allow_pickle,
        view_chunk=view_chunk,
        load=False,  # what takes long comes after all that may be wrong with the arguments
    )
    opened = time.perf_counter()
    wanted = session.preprocessing
    batch = load_images(
        paths,
        mode=mode or wanted.mode,  # type: ignore[arg-type]
        size=size or wanted.size,
        patch_size=wanted.patch_size,
        exif=exif,  # type: ignore[arg-type]
    )
    session.check(batch.images)
    prepare_folder(output)
    prepared = time.perf_counter()
    session.load()
    loaded = time.perf_counter()
    result = session.run(batch.images)
    computed = time.perf_counter()
    files = write_scene(result, batch, output, formats=kinds, drop_lowest=drop_lowest)
    written = time.perf_counter()

    views, _, height, width = batch.images.shape
    seconds = {
        "load": opened - started + loaded - prepared,
        "images": prepared - opened,
        "model": computed - loaded,
        "write": written - computed,
    }
    depth = result["depth"]
    if as_json:
        report = {
            "model": session.name,
            "views": views,
            "height": height,
            "width": width,
            "seconds": seconds,
            "files": [str(path) for path in files],
        }
        click.echo(json.dumps(report, indent=2))
        return
    times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    click.echo(f"{session.name}: {views} views of {width}x{height}; {times}")
    click.echo(f"depth from {depth.min():.3g} to {depth.max():.3g}, up to the scene's scale (not metres)")
    if session.config and session.config.moe and "expert_weights" not in result:
        command = "moe3d-export" if is_bundle(source) else "moe3d run"
        click.echo(f"no expert maps; for them: {command} --outputs expert_weights,expert_entropy")
    click.echo(f"{len(files)} files in {output}: cameras.json, {', '.join(kinds)}")
