"""The rules of a launch of the expert-mix kernels, without CUDA: sizes, pointers, grids, the C header."""

import ctypes
import re
from pathlib import Path
from typing import Any

import pytest
from native_host import NATIVE, Sizes, run, sizes, tensors, tool

pytest_plugins = ["native_fixtures"]

PLAN = (
    *("pixels_per_thread", "experts_bound", "weights_in_shared", "shared_bytes"),
    *("threads", "blocks", "blocks_per_view", "pixel_stride"),
)


def plan(host: ctypes.CDLL, call: Sizes, **pointers: Any) -> dict[str, int]:
    numbers = (ctypes.c_int64 * len(PLAN))()
    status = host.host_plan(ctypes.byref(call), ctypes.byref(tensors(**pointers)), numbers)
    assert status == 0, host.host_status_text(status)
    return dict(zip(PLAN, numbers, strict=True))


def refusal(host: ctypes.CDLL, call: Sizes, **pointers: Any) -> str:
    status = host.host_plan(ctypes.byref(call), ctypes.byref(tensors(**pointers)), (ctypes.c_int64 * len(PLAN))())
    assert status != 0
    text: bytes = host.host_status_text(status)
    return text.decode()


def test_the_usual_map_takes_four_pixels_a_thread(host: ctypes.CDLL) -> None:
    """518 * 518 = 268,324 pixels = 524.07 blocks of 128 * 4. Shared: 4 (2 * 32 + 32 + 3) floats."""
    assert plan(host, sizes()) == {
        "pixels_per_thread": 4,
        "experts_bound": 4,
        "weights_in_shared": 1,
        "shared_bytes": 1584,
        "threads": 128,
        "blocks": 525,
        "blocks_per_view": 525,
        "pixel_stride": 0,
    }


def test_channels_last_takes_a_pixel_a_thread_across_views(host: ctypes.CDLL) -> None:
    """3 * 268,324 pixels = 3144.4 blocks of 256; a pixel's 160 channels follow each other."""
    got = plan(host, sizes(layout=1, views=3))
    assert (got["threads"], got["blocks"], got["pixel_stride"]) == (256, 3145, 160)
    assert plan(host, sizes(layout=1, pixel_stride=176))["pixel_stride"] == 176


@pytest.mark.parametrize(("experts", "bound"), [(1, 4), (4, 4), (5, 8), (8, 8), (9, 16), (16, 16)])
def test_the_kernel_is_compiled_for_at_least_so_many_experts(host: ctypes.CDLL, experts: int, bound: int) -> None:
    assert plan(host, sizes(experts=experts))["experts_bound"] == bound


@pytest.mark.parametrize(
    "narrow",
    [
        {"width": 517},
        {"width": 519, "height": 6},
        {"hidden": 4100},
        {"depth": 4104},
        {"confidence": 4100},
        {"weights": 4104},
    ],
    ids=str,
)
def test_planes_or_pointers_off_the_alignment_take_a_pixel_a_thread(host: ctypes.CDLL, narrow: dict[str, int]) -> None:
    """4 pixels of 2 bytes need 8 bytes of alignment, 4 of depth 16."""
    pointers = {name: value for name, value in narrow.items() if name not in ("height", "width")}
    call = sizes(**{name: value for name, value in narrow.items() if name not in pointers})
    got = plan(host, call, **pointers)
    assert got["pixels_per_thread"] == 1
    assert got["blocks"] == -(-call.height * call.width // 128)


def test_a_float32_map_needs_sixteen_bytes_for_four_pixels(host: ctypes.CDLL) -> None:
    assert plan(host, sizes(type=1), hidden=4104)["pixels_per_thread"] == 4
    assert plan(host, sizes(type=0), hidden=4104)["pixels_per_thread"] == 1


def test_operands_above_what_every_gpu_shares_stay_in_global_memory(host: ctypes.CDLL) -> None:
    """48 KiB = 12,288 floats. 4 (2 * 1016 + 1016 + 3) = 12,204; with a gate of 1040 channels 12,300."""
    assert plan(host, sizes(expert_width=1016, gate_width=1016))["shared_bytes"] == 48816
    got = plan(host, sizes(expert_width=1016, gate_width=1040))
    assert (got["weights_in_shared"], got["shared_bytes"], got["experts_bound"]) == (0, 0, 16)


@pytest.mark.parametrize("empty", [{"views": 0}, {"height": 0}, {"width": 0}], ids=str)
def test_an_empty_map_launches_nothing_whatever_its_pointers(host: ctypes.CDLL, empty: dict[str, int]) -> None:
    for layout in (0, 1):
        assert plan(host, sizes(layout=layout, **empty), hidden=0, depth=0)["blocks"] == 0


def test_maps_above_two_to_the_31_elements_are_planned_exactly(host: ctypes.CDLL) -> None:
    """100 views of 160 x 518 x 518 are 4.3e9 elements; 4096 x 4096 x 16,384 pixels are 2^29 blocks of 512."""
    assert plan(host, sizes(views=100))["blocks"] == 52500
    assert plan(host, sizes(views=16384, height=4096, width=4096))["blocks"] == 2**29


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"type": 3}, "unknown type of the hidden map; expected float32, float16 or bfloat16"),
        ({"type": -1}, "unknown type"),
        ({"layout": 2}, "unknown layout of the hidden map; expected NCHW or channels last"),
        ({"experts": 0}, "the number of experts is out of range; expected 1 to 16"),
        ({"experts": 17}, "expected 1 to 16"),
        ({"expert_width": 12}, "a width of expert or gate is wrong; expected a positive multiple of 8 channels"),
        ({"expert_width": 0}, "a positive multiple of 8"),
        ({"gate_width": -8}, "a positive multiple of 8"),
        ({"gate_width": 2**40}, "too large"),
        ({"views": -1}, "views, height or width is negative"),
        ({"height": -1}, "negative"),
        ({"width": -1}, "negative"),
        ({"pixel_stride": 160}, "wrong pixel stride"),
        ({"layout": 1, "pixel_stride": 152}, "a multiple of 8 that is at least the number of channels"),
        ({"layout": 1, "pixel_stride": 164}, "a multiple of 8"),
        ({"temperature": 0.0}, "the temperature is wrong; expected a finite number"),
        ({"temperature": -1.0}, "the temperature is wrong"),
        ({"temperature": float("nan")}, "the temperature is wrong"),
        ({"temperature": float("inf")}, "the temperature is wrong"),
        ({"temperature": 1e-39}, "at least 1.2e-38"),
        ({"views": 2**40, "height": 2**10, "width": 2**10}, "too large to be addressed; mix fewer views"),
        ({"views": 2**62, "height": 2**62, "width": 2**62}, "too large"),
        ({"layout": 1, "views": 2**31, "height": 32, "width": 32}, "too large"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_refused_by_name(host: ctypes.CDLL, changed: dict[str, Any], expected: str) -> None:
    assert expected in refusal(host, sizes(**changed))


def test_a_missing_pointer_is_refused_but_for_the_weights(host: ctypes.CDLL) -> None:
    for name in ("hidden", "expert_weight", "expert_bias", "gate_weight", "gate_bias", "depth", "confidence"):
        assert "a required pointer is null" in refusal(host, sizes(), **{name: 0}), name
    assert plan(host, sizes(), weights=0)["pixels_per_thread"] == 4


@pytest.mark.parametrize(
    ("layout", "pointer"),
    [
        (0, {"hidden": 4097}),
        (1, {"hidden": 4104}),
        (0, {"gate_bias": 4098}),
        (0, {"depth": 4097}),
        (1, {"weights": 4098}),
    ],
    ids=str,
)
def test_a_misaligned_pointer_is_refused(host: ctypes.CDLL, layout: int, pointer: dict[str, int]) -> None:
    assert "a pointer is misaligned" in refusal(host, sizes(layout=layout), **pointer)


def test_every_status_of_the_c_header_has_a_text(host: ctypes.CDLL) -> None:
    header = (NATIVE / "plugin" / "moe3d_expert_mix.h").read_text(encoding="utf-8")
    statuses = {int(number) for number in re.findall(r"MOE3D_(?:OK|ERROR_\w+) = (\d+)", header)}
    assert statuses == {*range(11), 1000}
    texts = {host.host_status_text(status) for status in statuses - {1000}}
    assert len(texts) == 11
    assert None not in texts
    assert host.host_status_text(11) is None


def test_the_header_is_c(tmp_path: Path) -> None:
    source = tmp_path / "use.c"
    source.write_text('#include "moe3d_expert_mix.h"\nint main(void) { return MOE3D_OK; }\n', encoding="utf-8")
    compiler = tool("gcc", "compiles C")
    run(
        compiler,
        "-std=c99",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pedantic",
        "-fsyntax-only",
        f"-I{NATIVE / 'plugin'}",
        source,
    )
