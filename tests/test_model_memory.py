"""Peak memory of a forward pass, each measured in a process of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import random_images, small_model

from moe3d_deploy.child import peak_bytes, run_in_child
from moe3d_deploy.config import PRESETS, MoeConfig

FULL_SIZE_LIMIT_BYTES = 12e9  # the project's promise for 8 views of 518x392 in float32


def run_full_size(request: dict[str, Any], emit: object) -> dict[str, Any]:
    """Load the preset with its seeded weights and run it once on `shape` (B, S, 3, H, W)."""
    import torch

    from moe3d_deploy.checkpoint import load_model, seeded_source

    name = request["preset"]
    model = load_model(seeded_source(name, PRESETS[name]))
    with torch.inference_mode():
        out = model(random_images(*request["shape"]))
    finite = all(bool(value.isfinite().all()) for value in out.values())
    return {"finite": finite, "depth": list(out["depth"].shape)}


@pytest.mark.full
def test_memory_of_eight_views_at_full_size(record_testsuite_property: Callable[[str, object], None]) -> None:
    """The whole checkpoint, point head included, and all views in one chunk. --junitxml writes the figures."""
    request = {"preset": "moe3d-1b", "shape": [1, 8, 3, 392, 518]}

    result = run_in_child("test_model_memory:run_full_size", request)

    record_testsuite_property("eight_views_peak_bytes", result.peak_bytes)
    record_testsuite_property("eight_views_seconds", round(result.seconds, 1))
    assert result.value["depth"] == [1, 8, 392, 518]
    assert result.value["finite"]
    assert result.peak_bytes < FULL_SIZE_LIMIT_BYTES, f"{result.peak_bytes / 1e9:.2f} GB"


def peaks_of_chunks(request: dict[str, Any], emit: object) -> dict[str, int]:
    """Peak bytes of a forward pass in chunks of 1 view, and of one in a single chunk, after one to warm up."""
    import torch

    torch.set_num_threads(1)
    model, images = small_model(MoeConfig(), point_head=False), random_images(*request["shape"])
    peaks = {}
    for name, view_chunk in (("warm-up", 1), ("views", 1), ("whole", None)):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        with torch.inference_mode():
            model(images, view_chunk=view_chunk)
        peaks[name] = peak_bytes()
    return peaks


def test_chunks_of_views_need_less_memory() -> None:
    """The dense head's maps of 8 views are not alive at once when it runs on one at a time."""
    views, height, width = 8, 280, 280

    peaks = run_in_child("test_model_memory:peaks_of_chunks", {"shape": [1, views, 3, height, width]}).value

    # At the end of the head at least its 16 feature channels and the 32 of one branch, for each further view.
    assert peaks["whole"] - peaks["views"] > (views - 1) * height * width * (16 + 32) * 4
