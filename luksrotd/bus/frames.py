# SPDX-License-Identifier: GPL-2.0-or-later
"""Headers of messages, and dictionaries of properties, as bytes (D-Bus Specification, "Marshaling").

dbus-next has each field of a header pass through the code for values of any type, verified on the way: three times as
long as all else that an answer from the tree of objects takes.  What is written here is byte for byte what it writes,
and what is read is read by dbus-next where anything is unusual (tests/bus/test_frames.py).
"""

from collections.abc import Iterable, Mapping
from struct import Struct, error, unpack_from
from typing import Any, Final

from dbus_next._private.constants import LITTLE_ENDIAN, PROTOCOL_VERSION
from dbus_next._private.marshaller import Marshaller
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

FIXED: Final = 16
"""Bytes before the header fields."""
_HEADER: Final = Struct("<BBBBIII")
_TEXT: Final = Struct("<BBcBI")
"""Before a text in a header field: code, length of the signature, signature, its NUL, length of the text."""
_SIGNATURE: Final = Struct("<BBcBB")
_NUMBER: Final = _TEXT
"""A number in a header field: the same, but the number instead of the length."""
_LENGTH: Final = Struct("<I")
_PROPERTIES: Final = "a{sv}"

#: The fields that hold a text or a number: their codes, types, and attributes of ``Message``.
_TEXTS: Final = ((1, b"o", "path"), (2, b"s", "interface"), (3, b"s", "member"), (4, b"s", "error_name"))
_REPLY_SERIAL, _DESTINATION, _SENDER, _SIGNATURE_FIELD, _UNIX_FDS = 5, 6, 7, 8, 9
_NAMES: Final[Mapping[tuple[int, int], str]] = {
    **{(code, kind[0]): name for code, kind, name in _TEXTS},
    (_REPLY_SERIAL, ord("u")): "reply_serial",
    (_DESTINATION, ord("s")): "destination",
    (_SENDER, ord("s")): "sender",
    (_SIGNATURE_FIELD, ord("g")): "signature",
    (_UNIX_FDS, ord("u")): "",
}


class Prepared(Message):
    """A return whose body has been marshalled already."""

    def __init__(self, call: Message, signature: str, content: bytes) -> None:
        kind = MessageType.METHOD_RETURN
        super().__init__(call.sender, message_type=kind, reply_serial=call.serial, signature=signature)
        self.content = content


def frame(message: Message) -> bytearray:
    """The message as it is sent; raises what its marshalling raises."""
    content = message.content if isinstance(message, Prepared) else body(message.signature, message.body)
    fields = bytearray()
    for code, kind, name in _TEXTS:
        if value := getattr(message, name):
            _add_text(fields, code, kind, value)
    if message.reply_serial:
        _pad(fields)
        fields += _NUMBER.pack(_REPLY_SERIAL, 1, b"u", 0, message.reply_serial)
    if message.destination:
        _add_text(fields, _DESTINATION, b"s", message.destination)
    if message.signature:
        _pad(fields)
        text = message.signature.encode()
        fields += _SIGNATURE.pack(_SIGNATURE_FIELD, 1, b"g", 0, len(text)) + text + b"\0"
    if message.unix_fds:
        _pad(fields)
        fields += _NUMBER.pack(_UNIX_FDS, 1, b"u", 0, len(message.unix_fds))
    fixed = (LITTLE_ENDIAN, message.message_type.value, message.flags.value, PROTOCOL_VERSION)
    framed = bytearray(_HEADER.pack(*fixed, len(content), message.serial, len(fields))) + fields
    _pad(framed)
    return framed + content


def body(signature: str, values: list[Any]) -> bytes:
    """The values as bytes; raises ``SignatureBodyMismatchError`` and its like."""
    if not (signature or values):
        return b""
    return bytes(Marshaller(signature, values).marshall())  # type: ignore[no-untyped-call] # of dbus-next


def entries(properties: Mapping[str, Variant]) -> bytes:
    """The entries of a dictionary ``a{sv}``, which are the same wherever it stands in a message."""
    return body(_PROPERTIES, [properties])[8:]


def dictionary(content: bytes) -> bytes:
    """A body that is nothing but that dictionary."""
    return _LENGTH.pack(len(content)) + bytes(4) + content


def managed(objects: Mapping[str, Iterable[tuple[str, bytes]]]) -> bytes:
    """The body of what GetManagedObjects returns: by path, the interfaces with the entries of their properties."""
    found = bytearray(8)
    for path, interfaces in objects.items():
        _pad(found)
        _add_string(found, path)
        with_length = _open_array(found)
        for name, content in interfaces:
            _pad(found)
            _add_string(found, name)
            properties = _open_array(found)
            found += content
            _close_array(found, properties)
        _close_array(found, with_length)
    _LENGTH.pack_into(found, 0, len(found) - 8)
    return bytes(found)


def fields_of(frame: bytearray, length: int) -> dict[str, Any] | None:
    """The header fields of a message, as ``Message`` takes them; None if there is anything that is not as usual."""
    found: dict[str, Any] = {}
    at, end = FIXED, FIXED + length
    try:
        while at < end:
            at = -(-at // 8) * 8
            code, width, kind, nul = frame[at : at + 4]
            name = _NAMES.get((code, kind))
            if name is None or width != 1 or nul != 0:
                return None
            at += 4
            if kind == ord("u"):
                (value,) = unpack_from("<I", frame, at)
                at += 4
            else:
                if kind == ord("g"):
                    size, at = frame[at], at + 1
                else:
                    (size,), at = unpack_from("<I", frame, at), at + 4
                value = frame[at : at + size].decode()
                at += size + 1
            if name:
                found[name] = value
    except (ValueError, IndexError, error):
        return None
    return found if at == end else None


def _add_text(fields: bytearray, code: int, kind: bytes, value: str) -> None:
    _pad(fields)
    text = value.encode()
    fields += _TEXT.pack(code, 1, kind, 0, len(text)) + text + b"\0"


def _add_string(found: bytearray, value: str) -> None:
    text = value.encode()
    found += _LENGTH.pack(len(text)) + text + b"\0"


def _open_array(found: bytearray) -> tuple[int, int]:
    """Where its length is, and where its first entry; these are aligned to 8 bytes."""
    found += bytes(-len(found) % 4)
    at = len(found)
    found += bytes(4)
    _pad(found)
    return at, len(found)


def _close_array(found: bytearray, array: tuple[int, int]) -> None:
    at, first = array
    _LENGTH.pack_into(found, at, len(found) - first)


def _pad(found: bytearray) -> None:
    found += bytes(-len(found) % 8)
