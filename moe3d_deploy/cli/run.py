"""`moe3d run`: images in, depth, cameras, point clouds and pictures out."""

import shlex
import time
from pathlib import Path

import click
from click.core import ParameterSource

from moe3d_deploy.cli.arguments import comma_list
from moe3d_deploy.cli.run_inputs import check_scenes, input_options, read_views, remove_other_scenes, scene_folders
from moe3d_deploy.cli.run_outputs import depth_line, output_options, parse_outputs, print_json_lines

_EXPERT_OUTPUTS = ("expert_weights", "expert_entropy")


@click.command("run", short_help="Run a bundle on images, folders of them or a video")
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
@input_options
@output_options
@click.option("--outputs", default="", help="PyTorch only: outputs beyond the default ones, separated by commas.")
@click.option("--seed", type=click.IntRange(min=0), help="PyTorch presets only: seeded random weights.")
@click.option(
    "--view-chunk", type=click.IntRange(min=1),
    help="PyTorch, and bundles of --split: views the dense heads, or the encoder, take at a time.",
)  # fmt: skip
@click.option(
    "--plugin", metavar="PATH|none",
    help="PyTorch on a GPU: the expert-mix kernel's library, or none; default: the one that is found.",
)  # fmt: skip
@click.option("--allow-pickle", is_flag=True, help="PyTorch only: read a .pt checkpoint (weights only).")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON per view and per scene instead of text.")
def run_command(
    source: str,
    images: tuple[str, ...],
    output: Path,
    backend: str,
    mode: str | None,
    size: int | None,
    exif: str,
    max_views: int | None,
    frame_stride: int | None,
    start: int,
    all_frames: bool,
    group_by_size: bool,
    formats: str,
    original: bool,
    drop_lowest: float,
    voxel: str | None,
    max_points: int | None,
    outputs: str,
    seed: int | None,
    view_chunk: int | None,
    plugin: str | None,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Run BUNDLE (or, in PyTorch, a checkpoint or preset) on IMAGES: image files, videos, folders, patterns
    or - for an image from standard input; one scene in all.

    \b
    moe3d run bundle left.png right.png -o out
    moe3d run bundle clip.mp4 --max-views 16 -o out
    """
    from moe3d_deploy.runtime.output_folder import prepare_folder
    from moe3d_deploy.runtime.outputs import check_views, write_scene
    from moe3d_deploy.runtime.session import Session
    from moe3d_deploy.views import find_inputs

    kinds, options = parse_outputs(
        formats, original=original, drop_lowest=drop_lowest, voxel=voxel, max_points=max_points
    )
    inputs = find_inputs(images)
    started = time.perf_counter()
    session = Session.open(
        source,
        backend=backend,
        outputs=comma_list(outputs),
        seed=seed,
        allow_pickle=allow_pickle,
        view_chunk=view_chunk,
        plugin=plugin,
        load=False,  # what takes long comes after all that may be wrong with the arguments
    )
    opened = time.perf_counter()
    found = read_views(
        inputs,
        session.preprocessing,
        mode=mode,
        size=size,
        exif=exif,
        max_views=max_views,
        frame_stride=frame_stride,
        start=start,
        all_frames=all_frames,
        group_by_size=group_by_size,
    )
    scenes = scene_folders(found, output, group_by_size)
    check_scenes(session, scenes)
    for batch, folder in scenes:
        check_views(batch.views, kinds)
        prepare_folder(folder)
    prepared = time.perf_counter()
    session.load()
    loaded = time.perf_counter()
    notes = [*found.notes, *session.notes]
    if not as_json:
        for note in notes:
            click.echo(note)

    before = {"load": opened - started + loaded - prepared, "images": prepared - opened}
    group = output.resolve().name if group_by_size else None
    for batch, folder in scenes:
        begun = time.perf_counter()
        result = session.run(batch.images)
        computed = time.perf_counter()
        files = write_scene(result, batch, folder, formats=kinds, options=options, group_of=group)
        views, _, height, width = batch.images.shape
        seconds = {**before, "model": computed - begun, "write": time.perf_counter() - computed}
        before = {}  # what comes before the scenes counts in the first
        if as_json:
            shape = {"views": views, "height": height, "width": width}
            print_json_lines(folder, files, {"model": session.name, **shape, "seconds": seconds, "notes": notes})
            continue
        times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        click.echo(f"{session.name}: {views} views of {width}x{height}; {times}")
        click.echo(depth_line(folder))
        if session.config and session.config.moe and "expert_weights" not in result:
            click.echo(f"no expert maps; for them: {_way_to_expert_maps(source)}")
        click.echo(f"{len(files)} files in {folder}: cameras.json, {', '.join(kinds)}")
    remove_other_scenes(output, [folder for _, folder in scenes])


def _way_to_expert_maps(source: str) -> str:
    """What to do for them: another export of a bundle, or of a checkpoint this very run with two outputs more."""
    from moe3d_deploy.bundle import is_bundle
    from moe3d_deploy.image_files import shown

    if is_bundle(source):
        return f"export its checkpoint again with --outputs {','.join(_EXPERT_OUTPUTS)}"
    context = click.get_current_context()
    given = dict.fromkeys([*comma_list(context.params["outputs"]), *_EXPERT_OUTPUTS])
    words = ["moe3d", "run", f"--outputs={','.join(given)}"]
    positional: list[str] = []
    for parameter in context.command.params:
        name = parameter.name or ""
        if isinstance(parameter, click.Argument):
            value = context.params[name]
            positional += [value] if isinstance(value, str) else value
        elif name != "outputs" and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = isinstance(parameter, click.Option) and parameter.is_flag
            option = parameter.opts[-1]
            words.append(option if flag else f"{option}={context.params[name]}")
    if any(word.startswith("-") and word != "-" for word in positional):
        words.append("--")
    return shlex.join(map(shown, [*words, *positional]))
