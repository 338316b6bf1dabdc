"""A checkpoint in PyTorch with the expert-mix kernel, on the CPU's stand-in: used where it runs, and said so."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from exports import MOE
from sessions import images

from moe3d_deploy.checkpoint import save_checkpoint, seeded_source
from moe3d_deploy.cli.main import main
from moe3d_deploy.config import MoeConfig
from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.native import torch_op
from moe3d_deploy.native.loading import VARIABLE, Found
from moe3d_deploy.runtime import expert_mix_choice, torch_backend
from moe3d_deploy.runtime.session import Session

pytest_plugins = ["native_fixtures", "native_library"]

OUTPUTS = ("expert_weights", "expert_entropy")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with widths that the kernel takes."""
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    save_checkpoint(seeded_source("small", dataclasses.replace(MOE, moe=MoeConfig(3, 8, 16, 0.5))), folder)
    return folder


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(expert_mix_choice, "find", lambda: None)


@pytest.fixture
def as_on_a_gpu(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made as for a GPU; the stand-in then takes the CPU's tensors."""

    def choose(plugin: Any, config: Any, outputs: Any, device_type: str) -> Any:
        return expert_mix_choice.choose_mix(plugin, config, outputs, "cuda")

    monkeypatch.setattr(torch_backend, "choose_mix", choose)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("outputs", [(), OUTPUTS])
def test_the_kernel_gives_what_the_plain_form_gives(
    source: Path, stand_in: Path, outputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Session.open(source, outputs=outputs, plugin="none")
    assert plain.notes == ("expert mix: PyTorch's operators (as asked)",)
    scene = images(1, 2, 2, 3)
    expected = plain.run(scene)
    calls = []
    arguments = torch_op.arguments
    monkeypatch.setattr(torch_op, "arguments", lambda *given: calls.append(1) or arguments(*given))
    session = Session.open(source, outputs=outputs, plugin=stand_in)
    assert len(calls) == 2  # both of the self-test
    found = session.run(scene)
    assert len(calls) == 3
    assert session.notes == ("expert mix: the kernel in libmoe3d_expert_mix.so",)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5, err_msg=name)  # merged: another order


@pytest.mark.usefixtures("as_on_a_gpu")
def test_without_a_library_the_plain_form_runs_and_the_session_says_so(source: Path) -> None:
    session = Session.open(source, load=False)
    assert session.notes == (
        "expert mix: PyTorch's operators (there is no library of the kernel; build it with: "
        "python -m moe3d_deploy.native build)",
    )


def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = torch_op.arguments
    monkeypatch.setattr(torch_op, "arguments", lambda *given: arguments(*given[:3], 2 * given[3]))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_kernel_that_computes_something_else_is_not_used(
    source: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by itself it is left aside with a note; one that was asked for is an error."""
    expected = Session.open(source, plugin="none").run(images(1, 1, 2, 3))
    wrong_kernel(monkeypatch)
    monkeypatch.setattr(expert_mix_choice, "find", lambda: Found(stand_in))
    session = Session.open(source)
    (note,) = session.notes
    assert note.startswith("expert mix: PyTorch's operators (libmoe3d_expert_mix.so is off by ")
    found = session.run(images(1, 1, 2, 3))
    np.testing.assert_array_equal(found["depth"], expected["depth"])
    for asked in ({"plugin": stand_in}, {}):
        monkeypatch.setattr(expert_mix_choice, "find", lambda: Found(stand_in, VARIABLE))
        with pytest.raises(
            Moe3dError, match=r"^the expert-mix kernel cannot be used: .* is off by .*; leave the plugin"
        ):
            Session.open(source, **asked)  # type: ignore[arg-type]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_kernel_that_breaks_the_device_ends_the_session(
    source: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal access nothing runs in this process any more, so there is nothing to fall back to."""

    def illegal(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")

    monkeypatch.setattr(torch_op, "self_test", illegal)
    monkeypatch.setattr(expert_mix_choice, "find", lambda: Found(stand_in))
    with pytest.raises(Moe3dError) as caught:
        Session.open(source)
    assert str(caught.value) == (
        f"the expert-mix kernel in {stand_in} failed on this GPU: CUDA error: an illegal memory access was "
        "encountered; do without it: --plugin none"
    )


def test_the_command_shows_which_form_runs_and_refuses_a_kernel_without_a_gpu(
    source: Path,
    stand_in: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), np.random.default_rng(0).integers(0, 255, (28, 42, 3), dtype=np.uint8))
    words = ["run", str(source), str(photo), "-o", str(tmp_path / "out"), "--formats", "npz"]
    reason = "the kernel needs a GPU that PyTorch sees, and there is none"
    assert main([*words, "--plugin", str(stand_in)]) == 2
    assert capsys.readouterr().err == f"moe3d: plugin {stand_in}: {reason}; leave it out\n"
    monkeypatch.setattr(expert_mix_choice, "find", lambda: Found(stand_in, VARIABLE))
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"expert mix: PyTorch's operators ({reason})"
    assert main([*words, "--json"]) == 0
    scene = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scene["notes"] == [f"expert mix: PyTorch's operators ({reason})"]
