# SPDX-License-Identifier: GPL-2.0-or-later
"""A client of the bus that costs little: it sends bytes made beforehand, and looks for the end of a reply only.

What is timed with it is the bus and the service, not how a client's library makes Python objects of a reply.
"""

import os
import socket
import struct
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

from dbus_next.message import Message

from tests.support.testbed import BUS_SOCKET

BUS: Final = "org.freedesktop.DBus"
_CHUNK: Final = 1 << 20
_FIXED: Final = 16
_RETURN, _ERROR = 2, 3
_SERIAL_AT, _REPLY_SERIAL = 8, 5


class WireError(Exception):
    """The reply was an error, or none came."""


class Wire:
    """A connection of its own, which blocks."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.connect(str(BUS_SOCKET))
        self._serial = 0
        self._left = b""
        self._socket.sendall(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n")
        if not self._socket.recv(_CHUNK).startswith(b"OK "):
            raise WireError("the bus does not let us in")
        self._socket.sendall(b"BEGIN\r\n")
        self.call(call(BUS, "/org/freedesktop/DBus", BUS, "Hello"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def call(self, message: bytearray) -> int:
        """Send it, and wait for its reply; how many bytes that has.  Raises ``WireError``."""
        return self.calls(message, 1)

    def calls(self, message: bytearray, count: int) -> int:
        """Send it so many times at once, and wait for all replies; the bytes of all of them.  Raises ``WireError``."""
        first = self._serial + 1
        sent = bytearray()
        for _ in range(count):
            self._serial += 1
            struct.pack_into("<I", message, _SERIAL_AT, self._serial)
            sent += message
        self._socket.sendall(sent)
        wanted, length = set(range(first, self._serial + 1)), 0
        while wanted:
            frame = self._frame()
            if frame[1] in (_RETURN, _ERROR) and (serial := _reply_serial(frame)) in wanted:
                if frame[1] == _ERROR:
                    raise WireError(frame.decode(errors="replace"))
                wanted.remove(serial)
                length += len(frame)
        return length

    def _frame(self) -> bytes:
        """The next message, whatever it is."""
        self._fill(_FIXED)
        body, _, fields = struct.unpack_from("<III", self._left, 4)
        length = _FIXED + -(-fields // 8) * 8 + body
        self._fill(length)
        frame, self._left = self._left[:length], self._left[length:]
        return frame

    def _fill(self, length: int) -> None:
        while len(self._left) < length:
            data = self._socket.recv(_CHUNK)
            if not data:
                raise WireError("the bus has closed the connection")
            self._left += data


def call(
    destination: str, path: str, interface: str, member: str, signature: str = "", body: Sequence[Any] = ()
) -> bytearray:
    """A method call as it goes over the socket; ``Wire`` puts the serial in."""
    message = Message(destination, path, interface, member, signature=signature, body=list(body), serial=1)
    return bytearray(message._marshall())  # type: ignore[no-untyped-call] # of dbus-next


def _reply_serial(frame: bytes) -> int:
    """The header field; the bus puts it before all texts, or after some: found by its code and type."""
    at = frame.find(bytes((_REPLY_SERIAL, 1)) + b"u\0", _FIXED)
    return int.from_bytes(frame[at + 4 : at + 8], "little") if at >= 0 and at % 8 == 0 else 0
