# SPDX-License-Identifier: GPL-2.0-or-later
"""The client that measures: what it sends, and where it sees a reply begin and end."""

import socket
import struct
from typing import Any

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message

from luksrotd.bus.frames import frame
from luksrotd.bus.transport import Incoming
from tests.bench import wire


def reply_to(serial: int, text: str = "x", **more: Any) -> bytes:
    call = Message("a.b", "/x", "c.d", "E", serial=serial, **more)
    return bytes(frame(Message.new_method_return(call, "s", [text])))


def client() -> tuple[wire.Wire, socket.socket]:
    """A ``Wire`` without a bus, and the end of the socket where that would be."""
    made, (ours, theirs) = wire.Wire.__new__(wire.Wire), socket.socketpair()
    made._socket, made._serial, made._left = ours, 0, b""
    return made, theirs


def test_a_call_is_what_was_asked_for() -> None:
    made, bus = client()
    with made, bus:
        bus.sendall(wire.call("a.b", "/x", "c.d", "E", "s", ["text"]))
        message = Incoming(made._socket).receive()
    assert message is not None
    assert (message.destination, message.path, message.interface, message.member) == ("a.b", "/x", "c.d", "E")
    assert (message.message_type, message.body) == (MessageType.METHOD_CALL, ["text"])


@pytest.mark.parametrize("serial", [1, 255, 256, 2**32 - 1])
@pytest.mark.parametrize("sender", [None, ":1.5", ":1.1234567"])
def test_the_serial_that_a_reply_is_to(serial: int, sender: str | None) -> None:
    assert wire._reply_serial(reply_to(serial, sender=sender)) == serial


def test_a_message_that_is_no_reply_has_none() -> None:
    assert wire._reply_serial(bytes(wire.call("a.b", "/x", "c.d", "E"))) == 0
    # Where the same bytes stand in a text, they do not stand where a field begins.
    assert wire._reply_serial(bytes(wire.call("a.b", "/x", "c.d", "E", "s", ["y\x05\x01u\0zzzz"]))) == 0


def test_replies_are_counted_however_they_arrive() -> None:
    made, bus = client()
    with made, bus:
        signal = bytes(frame(Message.new_signal("/x", "c.d", "S", "s", ["text"])))
        replies = [reply_to(serial, "x" * serial) for serial in (2, 1, 3)]
        bus.sendall(signal + replies[0] + signal + replies[1] + replies[2] + signal)
        message = wire.call("a.b", "/x", "c.d", "E")
        assert made.calls(message, 3) == sum(map(len, replies))
        sent = bus.recv(1 << 16)
        size = len(message)
        assert [struct.unpack_from("<I", sent, at + 8)[0] for at in range(0, len(sent), size)] == [1, 2, 3]


def test_an_error_is_not_measured() -> None:
    made, bus = client()
    with made, bus:
        call = Message("a.b", "/x", "c.d", "E", serial=1)
        bus.sendall(frame(Message.new_error(call, "e.f.G", "refused")))
        with pytest.raises(wire.WireError, match="refused"):
            made.call(wire.call("a.b", "/x", "c.d", "E"))
        bus.shutdown(socket.SHUT_WR)
        with pytest.raises(wire.WireError, match="closed"):
            made.call(wire.call("a.b", "/x", "c.d", "E"))
