"""The linking of one object file of LLVM into an image that runs wherever it is mapped.

LLVM gives an ELF object: sections of code and of constants, and a list of places in them where the distance to another
place is to be filled in (relocations). All that the code refers to is in the same object, so that distances are all
there is: sections are laid out one behind the other, and the image needs nothing from the process that maps it. What
would need an address, or a function of the C library, is refused.

Sources: the System V ABI's ELF-64 object file format, its supplement for x86-64 (AMD64 psABI, 4.4), and Arm's ELF for
the 64-bit architecture (aaelf64, 5.7).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

_MACHINES = {62: "x86-64", 183: "AArch64"}
_ALLOCATED, _NO_BITS, _RELA, _SYMBOLS = 0x2, 8, 4, 2
_UNWINDING = ".eh_frame"  # which only a debugger, or an exception, would read
_PAGE = 4096

# Relocations of AArch64 that fill in the lower 12 bits of an address, by the bits that the instruction leaves out.
_LOW_12 = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4}


class NotLinkable(Exception):
    """Raised if an object needs more than distances within itself."""


class Image(NamedTuple):
    """Code that runs wherever it is mapped at the beginning of a page.

    Attributes:
        offsets: where each function begins.
    """

    code: bytes
    offsets: dict[str, int]


class _Section(NamedTuple):
    name: str
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int


class _Symbol(NamedTuple):
    name: str
    section: int
    value: int  # the offset in the section
    is_global: bool


def link(data: bytes) -> Image:
    """Return the image of an object file.

    Raises:
        NotLinkable: it is no ELF-64 object of a known machine, or refers to something outside itself.
    """
    if data[:6] != b"\x7fELF\x02\x01":
        raise NotLinkable("no ELF-64 file of little-endian numbers")
    (machine,) = struct.unpack_from("<H", data, 18)
    if machine not in _MACHINES:
        raise NotLinkable(f"machine {machine}")
    sections = _read_sections(data)
    places, code = _lay_out(data, sections)
    symbols = _read_symbols(data, sections)
    offsets = {symbol.name: places[symbol.section] + symbol.value for symbol in symbols if symbol.is_global}
    for section in sections:
        if section.kind == _RELA and section.info in places:
            for at in range(section.offset, section.offset + section.size, 24):
                where, kind, symbol, addend = struct.unpack_from("<QIIq", data, at)
                target = symbols[symbol]
                if target.section not in places:
                    raise NotLinkable(f"{target.name or 'a symbol'} is not in the object")
                _relocate(code, kind, places[section.info] + where, places[target.section] + target.value + addend)
    return Image(bytes(code), offsets)


def _read_sections(data: bytes) -> list[_Section]:
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    raw = [struct.unpack_from("<IIQQQQIIQQ", data, table + size * i) for i in range(count)]
    text = raw[names][4]
    return [
        _Section(_read_text(data, text + name), kind, flags, offset, length, link, info, max(1, align))
        for name, kind, flags, _, offset, length, link, info, align, _ in raw
    ]


def _lay_out(data: bytes, sections: list[_Section]) -> tuple[dict[int, int], bytearray]:
    """Return where each section that is needed at run time goes, and their bytes."""
    places: dict[int, int] = {}
    code = bytearray()
    for index, section in enumerate(sections):
        if section.flags & _ALLOCATED and section.name != _UNWINDING and section.size:
            code += bytes(-len(code) % section.align)
            places[index] = len(code)
            zeros = section.kind == _NO_BITS
            code += bytes(section.size) if zeros else data[section.offset : section.offset + section.size]
    return places, code


def _read_symbols(data: bytes, sections: list[_Section]) -> list[_Symbol]:
    table = next((section for section in sections if section.kind == _SYMBOLS), None)
    if table is None:
        return []
    names = sections[table.link].offset
    symbols = []
    for at in range(table.offset, table.offset + table.size, 24):
        name, info, _, section, value, _ = struct.unpack_from("<IBBHQQ", data, at)
        # A global one that is defined: in a section that is neither none (0) nor a special one.
        symbols.append(_Symbol(_read_text(data, names + name), section, value, info >> 4 == 1 and 0 < section < 0xFF00))
    return symbols


def _read_text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def _relocate(code: bytearray, kind: int, place: int, target: int) -> None:
    """Fill in one distance; kinds of the two machines do not overlap."""
    distance = target - place
    if kind in (2, 4, 261):  # R_X86_64_PC32, R_X86_64_PLT32, R_AARCH64_PREL32
        struct.pack_into("<i", code, place, distance)
        return
    (instruction,) = struct.unpack_from("<I", code, place)
    if kind == 275:  # R_AARCH64_ADR_PREL_PG_HI21
        pages = target // _PAGE - place // _PAGE
        instruction |= (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
    elif kind in _LOW_12:
        instruction |= (target % _PAGE >> _LOW_12[kind]) << 10
    elif kind in (282, 283):  # R_AARCH64_JUMP26, R_AARCH64_CALL26
        instruction |= distance >> 2 & 0x3FFFFFF
    else:
        raise NotLinkable(f"relocation {kind}")
    struct.pack_into("<I", code, place, instruction)
