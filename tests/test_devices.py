"""Device figures against clocks and units of the processors; devices by name, measured and by hand."""

import re
from pathlib import Path

import pytest

from moe3d_deploy import devices
from moe3d_deploy.devices import DEVICES, Device, find_device
from moe3d_deploy.errors import InputError

# Streaming multiprocessors, float32 units each, their clock; dense 16-bit FLOP (float32 sums) a clock of each, clock of
# the tensor figure. From the vendor's architecture papers: twice units x clock, and FLOP x clock, are the datasheet's.
UNITS = {
    "h200": (132, 128, 1.98e9, 4096, 1.83e9),
    "h100": (132, 128, 1.98e9, 4096, 1.83e9),
    "a100": (108, 64, 1.41e9, 2048, 1.41e9),
    "l4": (58, 128, 2.04e9, 1024, 2.04e9),
    "t4": (40, 64, 1.59e9, 1024, 1.59e9),
    "rtx4090": (128, 128, 2.52e9, 512, 2.52e9),
    "rtx3090": (82, 128, 1.695e9, 512, 1.695e9),
    "thor": (20, 128, 1.57e9, 8192, 1.575e9),
    "orin": (16, 128, 1.3e9, 2048, 1.3e9),
    "orin-nx-16": (8, 128, 0.918e9, 2048, 0.918e9),
}
ROUNDING = 0.01  # datasheets give two or three digits


@pytest.mark.parametrize("name", DEVICES)
def test_peaks_follow_from_the_units_and_their_clock(name: str) -> None:
    processors, lanes, clock, tensor_flop, tensor_clock = UNITS[name]
    device = DEVICES[name]
    assert device.flops["float32"] == pytest.approx(2 * processors * lanes * clock, rel=ROUNDING)
    assert device.flops["float16"] == pytest.approx(processors * tensor_flop * tensor_clock, rel=ROUNDING)
    assert device.flops.get("bfloat16", device.flops["float16"]) == device.flops["float16"]


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_names_its_source_and_plausible_memory(name: str) -> None:
    device = DEVICES[name]
    assert device.name == name
    assert re.search(r"datasheet|whitepaper|technical brief", device.source)
    assert "16 bits" in device.source
    assert not device.measured
    assert 1e11 < device.bandwidth < 1e13
    assert 1.6e10 <= device.memory < 1e12


def test_turing_has_no_bfloat16() -> None:
    assert [name for name, device in DEVICES.items() if "bfloat16" not in device.flops] == ["t4"]


def test_a_device_is_found_by_its_name() -> None:
    assert find_device("h200") is DEVICES["h200"]


def test_a_device_is_given_by_hand() -> None:
    device = find_device("165e12,1.0e12,24e9")
    assert device.flops == {"float32": 165e12, "float16": 165e12, "bfloat16": 165e12}
    assert (device.bandwidth, device.memory) == (1e12, 24e9)


@pytest.mark.parametrize("text", ["h900", "", "H200 ", "cpu0"])
def test_an_unknown_device_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(InputError, match=r"unknown; choose from h200, .*, cpu, or give FLOPS,BANDWIDTH,MEMORY"):
        find_device(text)


@pytest.mark.parametrize(
    "text",
    [
        "165e12,1e12",
        "165e12,1e12,24e9,1",
        "a,b,c",
        "1,,1",
        "0,1,1",
        "-1,1,1",
        "nan,1,1",
        "inf,1,1",
        "1e99,1,1e",
        "1_0,1,1",
    ],
)
def test_figures_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected FLOPS,BANDWIDTH,MEMORY in FLOP/s, bytes/s and bytes"):
        find_device(text)


def test_the_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_MEASURE_SECONDS", 0.01)
    device = find_device("cpu")
    assert device.measured
    assert "measured now" in device.source
    assert 1e8 < device.flops["float32"] < 1e14
    assert device.flops["float16"] == device.flops["float32"]
    assert device.flops["int8"] == 4 * device.flops["float32"]
    assert "bfloat16" not in device.flops
    assert 1e8 < device.bandwidth < 1e13
    assert device.memory > 1e8


def test_the_cpus_rate_is_work_over_the_quickest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """1024^3 multiply-adds, 128 MiB read and written; both in 10 ms."""
    monkeypatch.setattr(devices, "_shortest", lambda call: 0.01)
    device = devices.measured_cpu()
    assert device.flops["float32"] == pytest.approx(2 * 1024**3 / 0.01)
    assert device.bandwidth == pytest.approx(2 * 128 * 2**20 / 0.01)


def test_a_container_leaves_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_shortest", lambda call: 0.01)
    monkeypatch.setattr(devices, "memory_bytes", lambda: 24 << 30)
    monkeypatch.setattr(devices, "memory_limit_bytes", lambda: 4 << 30)
    assert devices.measured_cpu().memory == 4 << 30


def test_the_json_form_names_its_units() -> None:
    assert Device("d", "a device", {"float32": 1e12}, 2e9, 3e9, "a datasheet").to_dict() == {
        "name": "d",
        "title": "a device",
        "flops_per_second": {"float32": 1e12},
        "bytes_per_second": 2e9,
        "memory_bytes": 3e9,
        "source": "a datasheet",
        "measured": False,
        "compute_capability": None,
    }
    assert DEVICES["l4"].to_dict()["compute_capability"] == [8, 9]


def test_compute_capabilities_follow_the_architecture() -> None:
    """Turing 7.5; Ampere 8.0 in the A100, 8.6 in GA102, 8.7 in Orin; Ada 8.9; Hopper 9.0; Thor 11.0."""
    assert {name: device.compute_capability for name, device in DEVICES.items()} == {
        "h200": (9, 0),
        "h100": (9, 0),
        "a100": (8, 0),
        "l4": (8, 9),
        "t4": (7, 5),
        "rtx4090": (8, 9),
        "rtx3090": (8, 6),
        "thor": (11, 0),
        "orin": (8, 7),
        "orin-nx-16": (8, 7),
    }
    assert find_device("1e12,1e10,1e9").compute_capability is None


def test_the_page_on_costs_shows_the_table() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "costs.md").read_text(encoding="utf-8")
    rows = [
        f"| `{d.name}` | {d.title} | {'.'.join(map(str, d.compute_capability or ()))} "
        f"| {d.flops['float32'] / 1e12:g} | {d.flops['float16'] / 1e12:g} "
        f"| {d.bandwidth / 1e9:g} | {d.memory / 1e9:g} | {d.source} |"
        for d in DEVICES.values()
    ]
    header = "| name | device | compute capability | float32 | 16 bits | GB/s | GB | source |\n"
    header += "|---|---|---:|---:|---:|---:|---:|---|"
    table = "\n".join([header, *rows])
    assert table in page, f"docs/costs.md should hold:\n{table}"
