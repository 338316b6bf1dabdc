"""JSON from outside: what is strict and modest is read, all else is refused in a phrase."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe3d_deploy.strict_json import MAX_BYTES, MAX_DEPTH, JsonError, check_values, parse, show

LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(LEAVES | TEXTS, lambda v: st.lists(v) | st.dictionaries(TEXTS, v), max_leaves=8)


@given(VALUES, st.booleans())
def test_what_a_strict_writer_writes_is_read(value: object, ascii_only: bool) -> None:
    assert parse(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=40) | st.text('[]{}",:0123456789eE.-+NaInfity \\u').map(lambda text: text.encode()))
def test_any_bytes_are_read_or_refused_on_one_line(data: bytes) -> None:
    message = "read"
    try:
        parse(data)
    except JsonError as error:
        message = str(error)
    assert message.isprintable()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON: Expecting value"),
        (b"{} {}", "is not JSON: Extra data"),
        (b"\xff", r"is not UTF-8 text \(byte 0\)"),
        (b"[NaN]", "has NaN, which JSON does not allow"),
        (b"[-Infinity]", "has -Infinity, which JSON does not allow"),
        (b"[1e999]", "has a number that is not finite"),
        (b"[9223372036854775808]", "has an integer beyond 64 bits"),
        (b"[" + b"9" * 5000 + b"]", "has an integer beyond 64 bits"),
        (b'{"a": 1, "a": 1}', "has the key 'a' twice"),
        (b'[{"b": {"a": 1, "a": 2}}]', "has the key 'a' twice"),
        (b'["\\ud800"]', r"has a string that is not Unicode text: '\\ud800'"),
        (b'{"\\ud800": 1}', "has a string that is not Unicode text"),
        (b"[" * 33 + b"]" * 33, "is nested more than 32 deep"),
        (b"[" * 1_000_000, "is nested more than 32 deep"),
        (b'{"a":' * 1_000_000, "is nested more than 32 deep"),
    ],
)
def test_what_json_does_not_allow_or_nobody_needs_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(JsonError, match=f"^{message}"):
        parse(data)


def test_the_limits_themselves_are_allowed() -> None:
    assert parse(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert parse(b"[9223372036854775807, -9223372036854775808]") == [2**63 - 1, -(2**63)]
    assert parse(b"1" + b" " * (MAX_BYTES - 1)) == 1
    with pytest.raises(JsonError, match=f"has {MAX_BYTES + 1} bytes, more than {MAX_BYTES}"):
        parse(b"1" + b" " * MAX_BYTES)


@pytest.mark.parametrize(("value", "message"), [({1: 2}, "key that is not a string"), ([b"x"], "cannot hold a bytes")])
def test_values_to_write_are_held_to_the_same(value: object, message: str) -> None:
    with pytest.raises(JsonError, match=message):
        check_values(value)


def test_a_shown_value_is_short_and_drives_no_terminal() -> None:
    assert show("a\x1b[31m\n") == r"'a\x1b[31m\n'"
    assert show({"a": 1}) == "an object"
    assert show([1]) == "a list"
    assert show(None) == "null"
    assert len(show("x" * 1000)) == 80
