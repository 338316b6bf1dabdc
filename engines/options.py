"""The texts of a builder's flags: GPUs and sizes of memory."""

import re

from moe3d_deploy.errors import InputError
from moe3d_deploy.trt import Capability

_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}  # powers of 2, as trtexec has them


def parse_targets(text: str) -> tuple[Capability, ...]:
    """Read `sm89,sm120`, or `8.9,12.0`, as compute capabilities (major, minor), each once. Raises InputError."""
    return tuple(dict.fromkeys(map(_target, text.split(","))))


def _target(text: str) -> Capability:
    match = re.fullmatch(r"(?:sm_?)?([1-9][0-9]?)\.?([0-9])", text.strip(), re.IGNORECASE)
    if match is None:
        raise InputError(f"--target {text.strip()!r}: expected GPUs by compute capability, for example sm89,sm120")
    return int(match[1]), int(match[2])


def parse_size(flag: str, text: str) -> int:
    """Read `4G`, `512M`: bytes, a unit being a power of 2. Raises InputError with the flag."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([KMGT])", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise InputError(f"{flag} {text!r}: expected a size with its unit, K, M, G or T, for example 4G (4 x 2^30)")
    return int(float(match[1]) * 2 ** _UNITS[match[2].upper()])
