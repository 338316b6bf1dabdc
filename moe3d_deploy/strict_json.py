"""JSON without the liberties of Python's reader: no NaN, no key twice, bounded size, depth and numbers."""

import json
import math
import re
from typing import Any

MAX_BYTES = 16 << 20
MAX_DEPTH = 32  # nested objects and lists, the outermost counted
_INTEGER_DIGITS = 20  # longer than any 64-bit integer; int() itself takes quadratic time
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SHOWN_CHARACTERS = 80


class JsonError(ValueError):
    """What is wrong, as the rest of a sentence about the text: "has the key 'vit' twice"."""


def parse(data: bytes, *, max_bytes: int = MAX_BYTES) -> Any:
    """The value of UTF-8 JSON text. Raises JsonError for anything but strict, modest JSON."""
    if len(data) > max_bytes:
        raise JsonError(f"has {len(data)} bytes, more than {max_bytes}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonError(f"is not UTF-8 text (byte {error.start})") from None
    try:
        values = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)
    except RecursionError:
        raise JsonError(f"is nested more than {MAX_DEPTH} deep") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"is not JSON: {error}") from None
    check_values(values)
    return values


def check_values(values: Any) -> None:
    """Raise JsonError unless all numbers are finite or 64-bit integers, all strings Unicode, the depth modest.

    Goes level by level, so that no depth exhausts Python's stack.
    """
    level, depth = [values], 0
    while level:
        below: list[Any] = []
        for value in level:
            if isinstance(value, (dict, list, tuple)):
                if depth == MAX_DEPTH:
                    raise JsonError(f"is nested more than {MAX_DEPTH} deep")
                below += value
                if isinstance(value, dict):
                    if not all(isinstance(key, str) for key in value):
                        raise JsonError("has a key that is not a string")
                    below += value.values()
            elif isinstance(value, str):
                if _SURROGATE.search(value):
                    raise JsonError(f"has a string that is not Unicode text: {show(value)}")
            elif isinstance(value, float):
                if not math.isfinite(value):
                    raise JsonError("has a number that is not finite")
            elif isinstance(value, int):
                if not -(2**63) <= value < 2**63:
                    raise JsonError("has an integer beyond 64 bits")
            elif value is not None:
                raise JsonError(f"cannot hold a {type(value).__name__}")
        level, depth = below, depth + 1


def show(value: Any) -> str:
    """A short form of any value for a message, on one line, with nothing that drives a terminal."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = "null" if value is None else ascii(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise JsonError(f"has the key {show(key)} twice")
        values[key] = value
    return values


def _constant(text: str) -> Any:
    raise JsonError(f"has {text}, which JSON does not allow")


def _integer(text: str) -> int:
    if len(text) > _INTEGER_DIGITS:
        raise JsonError("has an integer beyond 64 bits")
    return int(text)
