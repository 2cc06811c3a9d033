# SPDX-License-Identifier: GPL-2.0-or-later
"""The socket: what dbus-next's reader and writer get wrong, put right by subclassing.

* A full socket buffer (EAGAIN) ended the connection: a burst of signals sufficed.  The writer waits instead.
* Received descriptors were inheritable.
* Each message waited for a turn of the loop to be written.  It is written at once if the socket takes it.
* A message that dbus-next cannot parse ended the connection, and a long one stalled the event loop.  A bad or
  oversized message is skipped alone; its frame is known good, because the bus daemon checked it.
"""

import array
import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, Literal

from dbus_next._private.constants import LITTLE_ENDIAN, PROTOCOL_VERSION
from dbus_next._private.unmarshaller import MarshallerStreamEndError, Unmarshaller
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.errors import InvalidMessageError
from dbus_next.message import Message
from dbus_next.signature import SignatureTree

from luksrotd.bus.frames import FIXED, fields_of, frame

log = logging.getLogger(__name__)

BODY_LIMIT: Final = 128 * 1024
"""Longest body, in bytes, of a call or signal that is looked at (parsing is Python and blocks the loop)."""
FIELDS_LIMIT: Final = 16 * 1024
"""Longest header fields, likewise: the bus sets no limit to an object path but that of the whole message."""
BATCH: Final = 32
"""Messages read or written before other events of the loop get their turn."""
FDS_LIMIT: Final = 253
"""Descriptors taken from one recvmsg(2): SCM_MAX_FD; dbus-daemon allows 16 in a message."""
CHUNK: Final = 1024 * 1024
"""Bytes taken from one recvmsg(2), which allocates them beforehand, whatever arrives."""

_CALL_OR_SIGNAL: Final = (1, 4)
_LENGTHS: Final = slice(4, 16)
_SENDER: Final = 7
_TEXTS: Final = {b"s": 4, b"o": 4, b"g": 1}
"""Types of texts, and the bytes of their lengths."""


class Incoming(Unmarshaller):
    """Reads one message.  ``oversized`` when its body was skipped; descriptors are close-on-exec.

    Of one whose header fields are too long nothing is left but what an answer needs.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(None, sock)  # type: ignore[no-untyped-call] # of dbus-next
        self.oversized = False
        self._frame = 0
        self._fields = 0

    def receive(self) -> Message | None:
        """The message, or None when the socket has no more for now.

        Raises ``EOFError`` or ``OSError`` (the connection ended) and ``InvalidMessageError`` (this message is bad, but
        was read to its end, so the next can be read).
        """
        try:
            self._fill(FIXED)
            self._frame = self._frame or self._measure()
            self._fill(self._frame)
        except MarshallerStreamEndError:
            return None
        try:
            if self.oversized and self._fields > FIELDS_LIMIT:
                return self._stub()
            if self.oversized:
                self.buf[4:8] = bytes(4)  # the body's length: header fields only
            self._unmarshall()
        except Exception as error:  # a peer's bytes must not end the connection
            self.close_fds()
            raise InvalidMessageError(f"cannot parse a message: {type(error).__name__}") from error
        message: Message | None = self.message
        return message

    def close_fds(self) -> None:
        """Close the descriptors of a message that will not be delivered."""
        for fd in self.unix_fds:
            os.close(fd)
        self.unix_fds.clear()

    def read(self, n: int, prefetch: bool = False) -> int:
        """Advance in the buffer, which holds the whole frame: nothing is ever read past its end."""
        start: int = self.offset
        if len(self.buf) - start < n:
            raise InvalidMessageError("truncated")
        if not prefetch:
            self.offset += n
        return start

    def _unmarshall(self) -> None:
        """Make ``message``; what is unusual in its header is left to dbus-next."""
        usual = self.buf[0] == LITTLE_ENDIAN and self.buf[3] == PROTOCOL_VERSION
        fields = fields_of(self.buf, self._fields) if usual else None
        if fields is None:
            super()._unmarshall()  # type: ignore[no-untyped-call] # of dbus-next
            return
        signature = SignatureTree._get(fields.pop("signature", ""))
        self.endian, self.offset = LITTLE_ENDIAN, FIXED + -(-self._fields // 8) * 8
        has_body = self.buf[4:8] != bytes(4)
        self.message = Message(
            message_type=MessageType(self.buf[1]),
            flags=MessageFlag(self.buf[2]),
            serial=int.from_bytes(self.buf[8:12], "little"),
            unix_fds=self.unix_fds,
            signature=signature,
            body=self._body(signature) if has_body else [],
            **fields,
        )

    def _body(self, signature: SignatureTree) -> list[Any]:
        return [self.read_argument(kind) for kind in signature.types]  # type: ignore[no-untyped-call] # of dbus-next

    def _fill(self, length: int) -> None:
        while (missing := length - len(self.buf)) > 0:
            try:
                data, fds = _receive(self.sock, missing)
            except BlockingIOError:
                raise MarshallerStreamEndError from None
            self.unix_fds.extend(fds)
            if not data:
                raise EOFError("the bus closed the connection")
            self.buf.extend(data)

    def _measure(self) -> int:
        """Length of the whole message (D-Bus Specification, "Message Format")."""
        lengths = bytes(self.buf[_LENGTHS])
        body, self._fields = (int.from_bytes(lengths[at : at + 4], self._order) for at in (0, 8))
        self.oversized = self.buf[1] in _CALL_OR_SIGNAL and (body > BODY_LIMIT or self._fields > FIELDS_LIMIT)
        return FIXED + -(-self._fields // 8) * 8 + body

    @property
    def _order(self) -> Literal["little", "big"]:
        return "little" if self.buf[0] == ord("l") else "big"

    def _stub(self) -> Message:
        """The message without its fields, but for its sender; raises ``ValueError`` if that is not found."""
        sender = _sender(bytes(self.buf[FIXED : FIXED + self._fields]), self._order)
        serial = int.from_bytes(self.buf[8:12], self._order)
        flags = MessageFlag(self.buf[2] & MessageFlag.NO_REPLY_EXPECTED.value)
        kind = MessageType(self.buf[1])
        return Message(
            path="/",
            interface="x.x",
            member="x",
            message_type=kind,
            flags=flags,
            sender=sender,
            serial=serial,
            unix_fds=self.unix_fds,
        )


def _sender(fields: bytes, order: Literal["little", "big"]) -> str:
    """The field SENDER, stepping over those before it; raises ``ValueError`` for one that is no text or number."""
    at = 0
    while at < len(fields):
        at = -(-at // 8) * 8
        code, kind = fields[at], fields[at + 2 : at + 3]  # between them the length of the signature, and a NUL after it
        if fields[at + 1] != 1 or kind not in (*_TEXTS, b"u"):
            break
        at += 4
        if kind == b"u":
            at += 4
            continue
        width = _TEXTS[kind]
        length, at = int.from_bytes(fields[at : at + width], order), at + width
        if code == _SENDER:
            return fields[at : at + length].decode()
        at += length + 1
    raise ValueError("no sender")


def _receive(sock: socket.socket, length: int) -> tuple[bytes, list[int]]:
    """recvmsg(2) with MSG_CMSG_CLOEXEC; ``socket.recv_fds`` of Python 3.11 ignores its flags."""
    fds = array.array("i")
    space = socket.CMSG_LEN(FDS_LIMIT * fds.itemsize)
    data, ancillary, _flags, _address = sock.recvmsg(min(length, CHUNK), space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, rights in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
    return data, fds.tolist()


class Outgoing:
    """Writes messages in order; ``write_callback`` and ``schedule_write`` are what dbus-next calls.

    A descriptor to be sent must stay open until the future of its message is done.
    """

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        *,
        is_ready: Callable[[], bool],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._sock = sock
        self._loop = loop
        self._is_ready = is_ready
        self._on_error = on_error
        self._queue: deque[tuple[memoryview, Sequence[int], asyncio.Future[None] | None]] = deque()

    def schedule_write(self, msg: Message | None = None, future: asyncio.Future[None] | None = None) -> None:
        """Write a message, or queue it; raises what marshalling it raises.  Nothing goes before Hello was answered."""
        waiting = bool(self._queue)
        if msg is not None:
            self._queue.append((memoryview(frame(msg)), tuple(msg.unix_fds or ()), future))
        if not (self._queue and self._is_ready()):
            return
        if not waiting:
            with suppress(OSError):  # a full socket waits for the loop, and a broken one will be found so by it
                self._write_first()
        if self._queue:
            self._loop.add_writer(self._sock.fileno(), self.write_callback)

    def write_callback(self) -> None:
        """Write some messages; the loop calls again while the socket takes more."""
        try:
            for _ in range(BATCH):
                if not self._queue:
                    self._loop.remove_writer(self._sock.fileno())
                    return
                if not self._write_first():
                    return
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._on_error(error)

    def _write_first(self) -> bool:
        """Whether all of the first one went; raises ``OSError``."""
        data, fds, future = self._queue[0]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self._sock.sendmsg([data], rights)
        if sent < len(data):
            self._queue[0] = (data[sent:], (), future)
            return False
        self._queue.popleft()
        if future is not None and not future.done():
            future.set_result(None)
        return True

    def abandon(self, error: Exception) -> None:
        """Fail all that was not written."""
        while self._queue:
            _data, _fds, future = self._queue.popleft()
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # nobody has to look

    async def drained(self) -> None:
        """Wait until all that is queued now was written, or abandoned."""
        last = next((future for _, _, future in reversed(self._queue) if future is not None), None)
        if last is not None:
            await asyncio.wait([last])
