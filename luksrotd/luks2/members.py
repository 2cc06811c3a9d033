# SPDX-License-Identifier: GPL-2.0-or-later
"""Typed access to the members of JSON objects; all of it raises ``FormatError`` that says where and what.

``where`` is the place of the object, as in "keyslot 3: area".
"""

from typing import Final, NoReturn

from luksrotd.errors import FormatError
from luksrotd.luks2 import layout
from luksrotd.luks2.jsontext import Json

_U64: Final = 2**64
_U32: Final = 2**32
#: libcryptsetup reads the numbers of objects with atoi(3): one that does not fit would be another number to it.
_OBJECT_NUMBER: Final = 2**31
#: Characters of hostile text that a message takes over.
_QUOTED: Final = 40


def references(raw: Json, name: str, where: str) -> tuple[int, ...]:
    """An array of object numbers."""
    entries = strings(raw, name, where)
    if len(entries) > layout.OBJECTS_MAX:
        fail(where, f"there are more than {layout.OBJECTS_MAX} {name}")
    return tuple(object_number(entry, f"{where}: {name}") for entry in entries)


def object_number(text: str, where: str) -> int:
    """The number that an object key or a reference stands for: decimal, without leading zeros."""
    if not (_decimal(text, 10) and str(int(text)) == text and int(text) < _OBJECT_NUMBER):
        fail(where, f"{quoted(text)} is not a number")
    return int(text)


def obj(raw: Json, name: str, where: str) -> Json:
    """A mandatory object."""
    value = raw.get(name)
    if not isinstance(value, dict):
        fail(where, f"object {name!r} is missing")
    return value


def string(raw: Json, name: str, where: str) -> str:
    """A mandatory text that is not empty."""
    value = raw.get(name)
    if not isinstance(value, str) or not value:
        fail(where, f"string {name!r} is missing")
    return value


def strings(raw: Json, name: str, where: str) -> tuple[str, ...]:
    """A mandatory array of texts."""
    value = raw.get(name)
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        fail(where, f"array of strings {name!r} is missing")
    return tuple(value)


def integer(raw: Json, name: str, where: str, *, at_least: int) -> int:
    """A mandatory number of 32 bits."""
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value < _U32:
        fail(where, f"integer {name!r} is missing or out of range")
    return value


def u64(raw: Json, name: str, where: str) -> int:
    """A 64-bit number, which LUKS2 writes as a decimal string."""
    value = raw.get(name)
    if not isinstance(value, str) or not _decimal(value, 20):
        fail(where, f"number {name!r} is missing or not a decimal string")
    if int(value) >= _U64:
        fail(where, f"number {name!r} is out of range")
    return int(value)


def quoted(text: str) -> str:
    """The beginning of hostile text, fit for a message."""
    return repr(text[:_QUOTED])


def fail(where: str, what: str) -> NoReturn:
    """Raise the one form of "this metadata is not good"."""
    raise FormatError(f"cannot read LUKS2 metadata: {where}: {what}")


def _decimal(text: str, digits: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= digits
