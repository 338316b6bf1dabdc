"""The CUDA driver through a stand-in for libcuda: which devices there are, and every way not to answer."""

import ctypes
from pathlib import Path
from typing import Any

import pytest

from moe3d_deploy import cuda_driver
from moe3d_deploy.cuda_driver import CudaDriver, Gpu


class FakeDriver:
    """libcuda of a machine with two cards, of which the second does not answer. Function names are cuda.h's."""

    failing: tuple[str, ...] = ()
    asked: list[str]

    def __init__(self, *failing: str) -> None:
        self.failing, self.asked = failing, []

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return 100 if "cuInit" in self.failing else 0  # CUDA_ERROR_NO_DEVICE

    def cuDriverGetVersion(self, out: Any) -> int:
        return self._give("cuDriverGetVersion", out, 12060)

    def cuDeviceGetCount(self, out: Any) -> int:
        return self._give("cuDeviceGetCount", out, 2)

    def cuDeviceGet(self, out: Any, index: int) -> int:
        return self._give("cuDeviceGet", out, 40 + index) if index == 0 else 101

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:
        assert (len(name), device.value) == (size, 40)
        name.value = b"Test Card 9000"
        return 999 if "cuDeviceGetName" in self.failing else 0

    def cuDeviceTotalMem_v2(self, out: Any, device: ctypes.c_int) -> int:
        assert isinstance(out._obj, ctypes.c_size_t)  # a C int would end at 2 GiB
        return self._give("cuDeviceTotalMem_v2", out, 141 << 30)

    def cuDeviceGetAttribute(self, out: Any, attribute: int, device: ctypes.c_int) -> int:
        assert device.value == 40
        return self._give(f"attribute {attribute}", out, {75: 8, 76: 7}[attribute])

    def _give(self, function: str, out: Any, value: int) -> int:
        out._obj.value = value
        return 999 if function in self.failing else 0


def load(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> None:
    def library(name: str) -> FakeDriver:
        assert name == "libcuda.so.1"
        return driver

    monkeypatch.setattr(ctypes, "CDLL", library)


def test_the_driver_says_its_version_and_the_devices_that_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, FakeDriver())
    assert cuda_driver.query() == CudaDriver(0, "12.6", (Gpu("Test Card 9000", (8, 7), 141 << 30),))
    assert cuda_driver.compute_capabilities() == [(8, 7)]


def test_a_driver_that_does_not_start_gives_its_status_and_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, FakeDriver("cuInit"))
    assert cuda_driver.query() == CudaDriver(100, None, ())
    assert cuda_driver.compute_capabilities() == []


def test_without_a_driver_there_is_neither_status_nor_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert cuda_driver.query() == CudaDriver(None, None, ())
    assert cuda_driver.compute_capabilities() == []


@pytest.mark.parametrize("function", ["cuDeviceGetName", "cuDeviceTotalMem_v2"])
def test_a_device_that_does_not_tell_its_name_or_memory_is_left_out(function: str) -> None:
    assert cuda_driver.read(FakeDriver(function)) == CudaDriver(0, "12.6", ())


@pytest.mark.parametrize("function", ["cuDeviceGetCount", "cuDeviceGet", "attribute 75", "attribute 76"])
def test_a_device_without_a_compute_capability_is_left_out(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    load(monkeypatch, FakeDriver(function))
    assert cuda_driver.query() == CudaDriver(0, "12.6", ())
    assert cuda_driver.compute_capabilities() == []


def test_a_version_that_is_not_told_is_none() -> None:
    assert cuda_driver.read(FakeDriver("cuDriverGetVersion")).api is None


def write_tool(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_driver_version_is_what_nvidia_smi_prints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = '[ "$1" = --query-gpu=driver_version ] && printf "580.10.01\\n580.10.01\\n"'
    write_tool(tmp_path, monkeypatch, asked)
    assert cuda_driver.driver_version() == "580.10.01"


@pytest.mark.parametrize("script", ["echo no devices were found; exit 6", "exit 0"])
def test_driver_version_is_unknown_where_nvidia_smi_fails_or_is_silent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str
) -> None:
    write_tool(tmp_path, monkeypatch, script)
    assert cuda_driver.driver_version() is None


def test_driver_version_is_unknown_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cuda_driver.driver_version() is None
