"""Where an ONNX file has its weights: a scan of its protobuf encoding that needs neither onnx nor protobuf.

The field numbers are those of onnx.proto (IR version 13), the encoding that of protobuf's wire format.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

from moe3d_deploy.errors import BundleError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 100  # messages in messages; protobuf's own readers stop there too
_MAX_VARINT_BYTES = 10

# Message -> field number -> the message in that field; every way from the model to a tensor.
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_KEY, _VALUE = 1, 2  # fields of an Entry

Content = bytes | mmap.mmap


class Malformed(Exception):
    """Bytes that are no protobuf, or have an encoding that readers might take differently."""


def external_locations(path: Path) -> set[str]:
    """The file names, as written, that the tensors of an ONNX file name as the place of their values.

    Of the file only the structure is read, not the values that lie in it. Raises BundleError for what is no protobuf
    or has an encoding that readers might take differently, OSError where the file cannot be read.
    """
    if path.stat().st_size == 0:
        return set()
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return {location.decode("utf-8", "backslashreplace") for location in _locations(data)}
    except Malformed as error:
        raise BundleError(f"{path} is not an ONNX file: {error}; copy the bundle again or export it again") from None


def _locations(data: mmap.mmap) -> Iterator[bytes]:
    todo = [("Model", 0, len(data), 1)]
    while todo:
        message, start, end, depth = todo.pop()
        if depth > _MAX_DEPTH:
            raise Malformed(f"messages are nested more than {_MAX_DEPTH} deep")
        if message == "Entry":
            fields = list(byte_fields(data, start, end))
            if any(number == _KEY and data[a:b] == b"location" for number, a, b in fields):
                yield from (data[a:b] for number, a, b in fields if number == _VALUE)
            continue
        inner = _FIELDS[message]
        todo += [(inner[n], a, b, depth + 1) for n, a, b in byte_fields(data, start, end) if n in inner]


def byte_fields(data: Content, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message that hold bytes, so also messages: number, start and end of the content.

    Raises Malformed.
    """
    while position < end:
        tag, position = _varint(data, position, end)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise Malformed(f"field number {number}")
        if kind == _VARINT:
            _, position = _varint(data, position, end)
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(kind)
        if kind == _BYTES:
            size, position = _varint(data, position, end)
        if size is None:
            raise Malformed(f"wire type {kind}")
        if size > end - position:
            raise Malformed("it ends too early")
        if kind == _BYTES:
            yield number, position, position + size
        position += size


def _varint(data: Content, position: int, end: int) -> tuple[int, int]:
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if position + index >= end:
            raise Malformed("it ends too early")
        byte = data[position + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise Malformed("a number is too long")
