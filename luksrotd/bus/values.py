# SPDX-License-Identifier: GPL-2.0-or-later
"""Bodies of messages to Python values and back.

Towards a handler: variants are unwrapped, structs are tuples, ``h`` is a ``ReceivedFd``.
Towards the bus: ``h`` is a descriptor (int) that from now on belongs to the message; a variant is ``Variant``.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dbus_next.constants import MessageType
from dbus_next.errors import DBusError
from dbus_next.message import Message
from dbus_next.signature import SignatureTree, SignatureType, Variant

from luksrotd.errors import InvalidRequest

OPTIONS_SIGNATURE: Final = "a{sv}"

OptionTable = Mapping[str, "str | OptionTable"]
"""Known keys of an ``a{sv}``, each with its signature, or the table of a nested ``a{sv}``."""


class ReceivedFd:
    """A descriptor that came with a message: closed when the handler returns, unless it took it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def fd(self) -> int:
        """The descriptor, still owned by the message; raises ``InvalidRequest`` when it was taken."""
        if self._fd < 0:
            raise InvalidRequest("cannot use one file descriptor for two purposes")
        return self._fd

    def take(self) -> int:
        """The descriptor, to be closed by who takes it; raises ``InvalidRequest`` the second time."""
        fd, self._fd = self.fd, -1
        return fd

    def close(self) -> None:
        """Close it, unless it was taken; idempotent."""
        if self._fd >= 0:
            os.close(self.take())


def from_body(tree: SignatureTree, body: Sequence[Any], fds: Sequence[ReceivedFd]) -> list[Any]:
    """The arguments of a message as Python values; raises ``InvalidRequest`` for a descriptor that did not come."""
    return [_from(kind, value, fds) for kind, value in zip(tree.types, body, strict=True)]


def _from(kind: SignatureType, value: Any, fds: Sequence[ReceivedFd]) -> Any:
    match kind.signature[0]:
        case "h":
            if value >= len(fds):
                raise InvalidRequest(f"cannot find file descriptor {value} in the message: it brought {len(fds)}")
            return fds[value]
        case "v":
            return _from(value.type, value.value, fds)
        case "(":
            return tuple(_from(child, item, fds) for child, item in zip(kind.children, value, strict=True))
        case "a" if kind.signature[1] == "{":
            key_kind, value_kind = kind.children[0].children
            return {_from(key_kind, key, fds): _from(value_kind, item, fds) for key, item in value.items()}
        case "a" if kind.signature[1] != "y":
            return [_from(kind.children[0], item, fds) for item in value]
        case _:
            return value


def check_options(table: OptionTable, options: Mapping[str, Variant], where: str = "option") -> None:
    """Hold an ``a{sv}`` as it came from the bus against what is known; raises ``InvalidRequest``."""
    for key, variant in options.items():
        known = table.get(key)
        if known is None:
            raise InvalidRequest(f"cannot accept unknown {where} {key[:64]!r}")
        wanted = known if isinstance(known, str) else OPTIONS_SIGNATURE
        if variant.signature != wanted:
            raise InvalidRequest(f"cannot accept {where} {key!r} of type {variant.signature}, it must be {wanted}")
        if not isinstance(known, str):
            check_options(known, variant.value, f"{where} {key}.")


def body_of(reply: Message | None) -> list[Any]:
    """The body of a reply; raises ``DBusError`` if it is an error."""
    if reply is None:
        raise TypeError("a call without a reply has no body")
    if reply.message_type is MessageType.ERROR:
        text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else ""
        raise DBusError(reply.error_name, text, reply)  # type: ignore[no-untyped-call] # of dbus-next
    body: list[Any] = reply.body
    return body


def to_body(tree: SignatureTree, result: Any, fds: list[int]) -> list[Any]:
    """What a handler returned as the body of its reply; every descriptor in it is appended to ``fds``.

    None for an empty signature, the value itself for one type, a tuple or list for several.  Raises ``TypeError`` or
    ``ValueError`` where it does not fit.
    """
    count = len(tree.types)
    if count == 1:
        result = [result]
    elif count == 0 and result is None:
        result = []
    if not isinstance(result, list | tuple) or len(result) != count:
        raise TypeError(f"{count} values wanted")
    return [_to(kind, value, fds) for kind, value in zip(tree.types, result, strict=True)]


def _to(kind: SignatureType, value: Any, fds: list[int]) -> Any:
    match kind.signature[0]:
        case "h":
            fds.append(value)
            return len(fds) - 1
        case "v":
            return Variant(value.signature, _to(value.type, value.value, fds))
        case "(":
            return [_to(child, item, fds) for child, item in zip(kind.children, value, strict=True)]
        case "a" if kind.signature[1] == "{":
            key_kind, value_kind = kind.children[0].children
            return {_to(key_kind, key, fds): _to(value_kind, item, fds) for key, item in value.items()}
        case "a" if kind.signature[1] != "y":
            return [_to(kind.children[0], item, fds) for item in value]
        case _:
            return value
