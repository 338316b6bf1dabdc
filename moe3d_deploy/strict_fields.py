"""A dataclass from a JSON object that has exactly its fields, each of exactly its type; every fault names its place."""

import dataclasses
import re
import types
import typing
from typing import Any, TypeVar

from moe3d_deploy.errors import BundleError
from moe3d_deploy.strict_json import show

MAY_BE_ABSENT = {"may_be_absent": True}
"""Metadata of a field whose key is left out where it has nothing to say."""

_T = TypeVar("_T")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def require(condition: bool, key: str, rule: str) -> None:
    """Raise BundleError, which names `key` and its rule, unless the condition holds."""
    if not condition:
        raise BundleError(f"{key} {rule}")


def read(cls: type[_T], values: Any, where: str) -> _T:
    """Build dataclass `cls` from a JSON object that has exactly its fields, but for those that may be absent."""
    if not isinstance(values, dict):
        raise BundleError(f"{where or 'the top level'} must be an object, not {show(values)}")
    hints = typing.get_type_hints(cls)
    prefix = where + "." if where else ""
    for key in values:
        require(key in hints, f"{prefix}{show(key)}", "is unknown")
    optional = {f.name for f in dataclasses.fields(cls) if f.metadata == MAY_BE_ABSENT}  # type: ignore[arg-type]
    for key in hints:
        require(key in values or key in optional, prefix + key, "is missing")
    arguments = {key: _convert(hint, values[key], prefix + key) for key, hint in hints.items() if key in values}
    try:
        return cls(**arguments)
    except BundleError as error:
        raise BundleError(f"{prefix}{error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type that `hint` names; int, float, bool and str are never mixed up."""
    if isinstance(hint, types.UnionType):
        arms = typing.get_args(hint)
        if value is None and type(None) in arms:
            return None
        hint = next((arm for arm in arms if arm is type(value)), arms[0])
    origin, items = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return read(typing.cast(type, hint), value, where)
    if origin is tuple:
        require(isinstance(value, list), where, f"must be a list, not {show(value)}")
        kinds = items[:1] * len(value) if items[-1] is ... else items
        require(len(value) == len(kinds), where, f"must have {len(kinds)} entries, not {len(value)}")
        return tuple(_convert(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        require(isinstance(value, dict), where, f"must be an object, not {show(value)}")
        if items[1] is Any:
            return value
        return {_convert(str, k, where): _convert(items[1], v, f"{where}[{show(k)}]") for k, v in value.items()}
    if hint is float and type(value) is int:
        value = float(value)
    require(type(value) is hint, where, f"must be {hint.__name__}, not {show(value)}")
    if hint is str:
        good = value != "" and not _CONTROL.search(value)
        require(good, where, f"must be non-empty text without control characters, not {show(value)}")
    return value
