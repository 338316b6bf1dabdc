"""Which names a shared library exports, read from its file: nothing of it is loaded, so nothing of it runs.

The layout is that of the ELF-64 object file format, little-endian, as x86-64 and aarch64 have it.
"""

import platform
import struct

_MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine
_SHARED_OBJECT = 3  # e_type ET_DYN
_SHT_DYNSYM = 11
_HEADER, _SECTION, _SYMBOL = struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ")
_GLOBAL, _WEAK = 1, 2  # st_info, upper half
_DEFAULT, _PROTECTED = 0, 3  # st_other, lower bits


class NotLoadableError(Exception):
    """Why the bytes are no shared library of this machine, as the rest of a sentence that begins with the file."""


def exported_names(content: bytes) -> frozenset[str]:
    """The names that a shared library defines for others, from the bytes of its file.

    Raises NotLoadableError for what is no shared library, is one for another machine, or is damaged.
    """
    if content[:4] != b"\x7fELF":
        raise NotLoadableError("is no shared library (no ELF file)")
    if content[4:6] != b"\x02\x01":
        raise NotLoadableError("is a shared library of another kind of machine (not 64-bit little-endian)")
    try:
        _, kind, machine, _, _, _, table, _, _, _, _, size, count, _ = _HEADER.unpack_from(content)
        if kind != _SHARED_OBJECT:
            raise NotLoadableError("is an ELF file, but no shared library")
        if machine != _MACHINES.get(platform.machine(), machine):
            raise NotLoadableError(f"is a shared library for another processor, this machine is {platform.machine()}")
        sections = [_SECTION.unpack_from(content, table + index * size) for index in range(count)]
        names: set[str] = set()
        for section in sections:
            if section[1] == _SHT_DYNSYM:
                names.update(_symbols(content, section, sections[section[6]]))
    except (struct.error, IndexError, ValueError):
        raise NotLoadableError("is a damaged shared library") from None
    return frozenset(names)


def _symbols(content: bytes, table: tuple[int, ...], texts: tuple[int, ...]) -> set[str]:
    names = set()
    for position in range(table[4], table[4] + table[5], _SYMBOL.size):
        name, info, other, section, _, _ = _SYMBOL.unpack_from(content, position)
        if section and info >> 4 in (_GLOBAL, _WEAK) and other & 3 in (_DEFAULT, _PROTECTED):
            start = texts[4] + name
            names.add(content[start : content.index(b"\0", start)].decode("ascii", "backslashreplace"))
    return names
