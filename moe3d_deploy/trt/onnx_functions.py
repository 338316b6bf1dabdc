"""An ONNX model without one of its functions, for parsers that would take the function where a plugin is wanted.

The field numbers are those of onnx.proto (IR version 13); neither onnx nor protobuf is needed.
"""

from moe3d_deploy.errors import BundleError
from moe3d_deploy.external_data import Malformed, byte_fields

_FUNCTIONS = 25  # of a ModelProto
_NAME, _DOMAIN = 1, 10  # of a FunctionProto
_LENGTH_DELIMITED = 2


def without_function(model: bytes, name: str, domain: str, source: str) -> bytes:
    """The bytes of an ONNX model without its functions of this name and domain; the same bytes where it has none.

    source   what errors call the model

    Raises BundleError for bytes that are no ONNX model.
    """
    wanted = {(_NAME, name.encode()), (_DOMAIN, domain.encode())}
    kept, position = [], 0
    try:
        for number, start, end in byte_fields(model, 0, len(model)):
            if number != _FUNCTIONS:
                continue
            texts = {(inner, model[a:b]) for inner, a, b in byte_fields(model, start, end) if inner in (_NAME, _DOMAIN)}
            if texts == wanted:
                head = _varint(_FUNCTIONS << 3 | _LENGTH_DELIMITED) + _varint(end - start)
                if model[start - len(head) : start] != head:
                    raise Malformed("a function has an unusual encoding")
                kept.append(model[position : start - len(head)])
                position = end
    except Malformed as error:
        raise BundleError(f"{source} is not an ONNX file: {error}; copy the bundle again or export it again") from None
    return b"".join([*kept, model[position:]])


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
