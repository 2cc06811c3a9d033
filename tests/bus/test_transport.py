# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages on their way to and from a socket that is not the bus."""

import asyncio
import os
import socket

import pytest
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.errors import InvalidMessageError
from dbus_next.message import Message
from dbus_next.signature import Variant

from luksrotd.bus.frames import frame
from luksrotd.bus.transport import BODY_LIMIT, Incoming, Outgoing

pytestmark = pytest.mark.asyncio


class Wires:
    """Both ends, and what the writer says of errors."""

    def __init__(self):
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.theirs.setblocking(False)
        self.errors = []
        self.ready = True
        loop = asyncio.get_running_loop()
        self.writer = Outgoing(self.ours, loop, is_ready=lambda: self.ready, on_error=self.failed)

    def failed(self, error):
        self.errors.append(error)
        asyncio.get_running_loop().remove_writer(self.ours)
        self.writer.abandon(error)

    def send(self, message):
        future = asyncio.get_running_loop().create_future()
        self.writer.schedule_write(message, future)
        return future

    def received(self):
        try:
            return self.theirs.recv(1 << 22)
        except BlockingIOError:
            return b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        asyncio.get_running_loop().remove_writer(self.ours)
        self.ours.close()
        self.theirs.close()


def call(text="x", serial=1, **more):
    return Message("a.b", "/x", "c.d", "E", signature="s", body=[text], serial=serial, **more)


async def test_a_message_is_written_at_once():
    with Wires() as wires:
        sent = wires.send(call())
        assert sent.done()
        assert wires.received() == frame(call())


async def test_nothing_is_written_before_it_is_ready():
    with Wires() as wires:
        wires.ready = False
        sent = [wires.send(call("one")), wires.send(call("two"))]
        assert (wires.received(), [one.done() for one in sent]) == (b"", [False, False])
        wires.ready = True
        wires.writer.schedule_write()
        await asyncio.wait(sent)
        assert wires.received() == frame(call("one")) + frame(call("two"))


async def test_what_the_socket_does_not_take_waits_and_keeps_its_order():
    with Wires() as wires:
        large = "x" * (1 << 20)
        sent = [wires.send(call(text)) for text in (large, "small", large, "last")]
        assert not any(one.done() for one in sent)
        received = bytearray()
        while not all(one.done() for one in sent):
            received += wires.received()
            await asyncio.sleep(0)
        received += wires.received()
        assert received == b"".join(frame(call(text)) for text in (large, "small", large, "last"))
        assert wires.send(call()).done()


async def test_a_broken_socket_is_told_of_by_the_loop():
    """Not in the middle of whoever sends."""
    with Wires() as wires:
        wires.theirs.close()
        sent = wires.send(call())
        assert (wires.errors, sent.done()) == ([], False)
        await asyncio.wait([sent])
        assert isinstance(sent.exception(), BrokenPipeError)
        assert len(wires.errors) == 1


async def test_descriptors_go_with_their_own_message():
    with Wires() as wires:
        read, write = os.pipe()
        wires.send(call("first"))
        wires.send(call("second", unix_fds=[read, write]))
        wires.send(call("third"))
        incoming = [Incoming(wires.theirs) for _ in range(3)]
        found = [(one.receive().body, len(one.unix_fds)) for one in incoming]
        for one in incoming:
            one.close_fds()
        os.close(read)
        os.close(write)
        assert found == [(["first"], 0), (["second"], 2), (["third"], 0)]


async def test_descriptors_go_once_with_a_message_that_goes_in_parts():
    with Wires() as wires:
        read, write = os.pipe()
        text = "x" * (BODY_LIMIT - 16)
        wires.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        sent = wires.send(call(text, unix_fds=[read]))
        assert not sent.done()
        reading = Incoming(wires.theirs)
        while (received := reading.receive()) is None:  # noqa: ASYNC110 - the writer needs turns of the loop
            await asyncio.sleep(0)
        found = (received.body, len(reading.unix_fds))
        reading.close_fds()
        os.close(read)
        os.close(write)
        assert found == ([text], 1)


async def test_a_message_comes_in_pieces():
    with Wires() as wires:
        reading = Incoming(wires.theirs)
        whole = frame(call(flags=MessageFlag.NO_REPLY_EXPECTED))
        for at in range(len(whole) - 1):
            wires.ours.send(whole[at : at + 1])
            assert reading.receive() is None
        wires.ours.send(whole[-1:])
        message = reading.receive()
        assert (message.member, message.body, message.serial) == ("E", ["x"], 1)
        assert (message.message_type, message.flags) == (MessageType.METHOD_CALL, MessageFlag.NO_REPLY_EXPECTED)


async def test_a_message_that_is_odd_is_refused_alone():
    with Wires() as wires:
        cut = frame(call("x" * 8))
        cut[-12:-8] = (2000).to_bytes(4, "little")  # a text that is longer than the message
        wires.ours.send(cut + frame(call("next")))
        with pytest.raises(InvalidMessageError):
            Incoming(wires.theirs).receive()
        assert Incoming(wires.theirs).receive().body == ["next"]


async def test_big_endian_is_understood():
    """No bus daemon makes it of little endian, but a client of that kind may exist."""
    fields = b"\x01\x01o\0\0\0\0\x02/x\0\0\0\0\0\0" + b"\x03\x01s\0\0\0\0\x01E\0"
    with Wires() as wires:
        head = b"B\x01\0\x01" + (0).to_bytes(4, "big") + (9).to_bytes(4, "big") + len(fields).to_bytes(4, "big")
        wires.ours.send(head + fields + bytes(-len(fields) % 8))
        message = Incoming(wires.theirs).receive()
        assert (message.path, message.member, message.serial, message.body) == ("/x", "E", 9, [])


async def test_of_a_long_message_nothing_but_the_header_is_read():
    with Wires() as wires:
        message = Message("a.b", "/x", "c.d", "E", signature="av", body=[[Variant("s", "x" * BODY_LIMIT)]], serial=1)
        sent = wires.send(message)
        reading = Incoming(wires.theirs)
        while (received := reading.receive()) is None:  # noqa: ASYNC110 - the writer needs turns of the loop
            await asyncio.sleep(0)
        assert sent.done()
        assert reading.oversized
        assert (received.member, received.body) == ("E", [])
