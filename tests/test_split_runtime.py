"""Running split bundles: views in chunks, tokens that are used again, a window that slides, and what is refused."""

import functools
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import splits
import variants
from click.testing import CliRunner
from exports import MOE
from sessions import images, of_bundle, of_checkpoint

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.cli.inspect import inspect_command
from moe3d_deploy.cli.main import export_main
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.runtime.onnx_backend import OnnxBackend
from moe3d_deploy.runtime.session import Session
from moe3d_deploy.runtime.sliding_window import SlidingWindow
from moe3d_deploy.runtime.split_backend import SplitBackend


@functools.cache
def session(split: str) -> Session:
    return Session.open({"heads": splits.heads, "encoder": splits.encoder}[split]().path)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


class Counted:
    """How many views went through each part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chunks: dict[str, list[int]] = {}
        real = OnnxBackend.run_on

        def run_on(backend: OnnxBackend, inputs: Any, **options: Any) -> Any:
            first = next(iter(inputs.values()))
            self.chunks.setdefault(backend.output_names[0], []).append(first.shape[0] * first.shape[1])
            return real(backend, inputs, **options)

        monkeypatch.setattr(OnnxBackend, "run_on", run_on)


def test_the_heads_see_as_many_views_at_a_time_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, one_by_one = images(2, 5, 1, 2), session("heads")  # made, and verified, before anything is counted
    counted = Counted(monkeypatch)
    one_by_one.run(scene)
    assert counted.chunks == {"tokens_0": [10], "depth": [1] * 10}
    counted.chunks.clear()
    Session.open(splits.heads().path, view_chunk=4).run(scene)
    assert counted.chunks == {"tokens_0": [10], "depth": [4, 4, 2]}


def test_one_scene_comes_back_without_its_axis() -> None:
    scene = images(1, 2, 2, 3)
    for split in ("heads", "encoder"):
        found, expected = session(split).run(scene[0]), session(split).run(scene)
        assert found["depth"].shape == (2, 28, 42)
        assert_same(found, {name: value[0] for name, value in expected.items()})


def test_tokens_of_views_are_encoded_once_and_give_what_images_do(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = images(1, 3, 2, 3)[0]
    expected = session("encoder").run(scene)
    counted = Counted(monkeypatch)
    first, second = session("encoder").encode(scene[:2]), session("encoder").encode(scene[2:])
    assert first.shape == (2, 2, 3, 32)
    assert first.dtype == np.float32
    assert counted.chunks == {"patch_tokens": [1, 1, 1]}
    counted.chunks.clear()
    assert_same(session("encoder").run_tokens(np.concatenate([first, second])), expected)
    assert counted.chunks == {"depth": [3]}


def test_tokens_of_several_scenes_keep_their_axis() -> None:
    scene = images(2, 2, 1, 2)
    tokens = session("encoder").encode(scene)
    assert tokens.shape == (2, 2, 1, 2, 32)
    assert_same(session("encoder").run_tokens(tokens), session("encoder").run(scene))


def test_a_window_runs_its_newest_frames_and_encodes_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = images(1, 4, 2, 2)[0]
    expected = [session("encoder").run(frames[max(0, i - 1) : i + 1]) for i in range(4)]
    counted = Counted(monkeypatch)
    window = SlidingWindow(session("encoder"), views=2)
    for frame, result in zip(frames, expected, strict=True):
        assert_same(window.add(frame), result)
    assert counted.chunks == {"patch_tokens": [1] * 4, "depth": [1, 2, 2, 2]}


def test_a_window_takes_frames_of_one_size() -> None:
    window = SlidingWindow(session("encoder"), views=3)
    window.add(images(1, 1, 2, 3)[0, 0])
    with pytest.raises(InputError) as caught:
        window.add(images(1, 1, 3, 2)[0, 0])
    assert str(caught.value) == "frame of 3x2 patches in a window of 2x3: resize it, or begin a new window"
    with pytest.raises(InputError, match="^a window of 0 views holds no frame; pass 1 or more$"):
        SlidingWindow(session("encoder"), views=0)


@pytest.mark.parametrize("of", [of_bundle, of_checkpoint, lambda: session("heads")])
def test_tokens_need_an_encoder_of_its_own(of: Any) -> None:
    for use in (lambda: of().encode(images(1, 1, 1, 1)), lambda: of().run_tokens(np.zeros((1, 1, 1, 32)))):
        with pytest.raises(InputError) as caught:
            use()
        assert str(caught.value) == "the encoder of small is no part of its own; export with --split encoder"


@pytest.mark.parametrize(
    "tokens",
    [
        np.zeros((1, 2, 3, 64), np.float32),
        np.zeros((1, 2, 3, 32), np.float64),
        np.zeros((2, 3, 32), np.float32),
        np.zeros((1, 1, 1, 2, 3, 32), np.float32),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tokens: Any) -> None:
    with pytest.raises(InputError) as caught:
        session("encoder").run_tokens(tokens)
    assert str(caught.value) == (
        f"tokens: expected float32 (S, rows, columns, 32) or (B, S, rows, columns, 32), got {tokens.dtype} "
        f"{tokens.shape}; take what encode gives"
    )


def test_a_scene_without_views_and_a_chunk_without_any_are_refused() -> None:
    with pytest.raises(InputError, match="^images: views is 0; accepted are 1 and more"):
        session("encoder").run_tokens(np.zeros((0, 2, 3, 32), np.float32))
    with pytest.raises(InputError, match="^view_chunk must be at least 1, got 0$"):
        Session.open(splits.heads().path, view_chunk=0)
    with pytest.raises(InputError, match="^view_chunk must be at least 1, got -1$"):
        SplitBackend({}, (), view_chunk=-1)


def test_a_failure_names_what_the_part_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = session("encoder").encode(images(1, 2, 1, 1)[0])
    backend = OnnxBackend(splits.encoder().part_paths["decoder"])
    with pytest.raises(Moe3dError, match=r"^ONNX Runtime failed on patch_tokens 2x1x1x32: .*; try fewer views$"):
        backend.run_on({"patch_tokens": tokens})


def test_inspect_shows_the_parts() -> None:
    result = CliRunner().invoke(inspect_command, [str(splits.encoder().path)])
    assert result.exit_code == 0, result.output
    lines = [line[14:] for line in result.stdout.splitlines()]
    start = lines.index("encoder, model.encoder.onnx: view by view, in chunks of any size")
    assert lines[start + 1].split()[:3] == ["takes", "images", "float32"]
    assert lines[start + 2].startswith("  gives  patch_tokens  float32  (B, S, rows, columns, 32)")
    assert lines[start + 3] == "decoder, model.decoder.onnx: all views of a scene together"
    assert "parts" in result.stdout


def test_a_split_bundle_is_not_split_again(capsys: Any, tmp_path: Path) -> None:
    bundle = variants.copy(splits.heads(), tmp_path)
    assert export_main([str(bundle.path), "--split", "encoder"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == f"moe3d-export: {bundle.path} is a bundle, its model is exported already; leave --split out"


def test_the_parts_of_the_bundle_have_their_places() -> None:
    bundle = Bundle.open(splits.heads().path)
    assert bundle.model_path == bundle.path / "model.aggregator.onnx"
    assert list(bundle.part_paths) == ["aggregator", "heads"]
    assert Bundle.open(exports.bundle().path).part_paths == {}
    assert MOE.patch_size == bundle.manifest.preprocessing.patch_size
