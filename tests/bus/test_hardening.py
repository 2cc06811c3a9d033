# SPDX-License-Identifier: GPL-2.0-or-later
"""Attacks on a service, each run on luksrotd's bus and on dbus-next as it is.

The second half keeps the first honest: a probe that cannot tell the two apart proves nothing, and one that dbus-next
passes one day shows a mend that is no longer needed.
"""

import asyncio
import itertools
import os
import signal
import subprocess

import pytest
from dbus_next.constants import MessageFlag
from dbus_next.message import Message

from luksrotd.bus import connection
from luksrotd.bus.connection import Bus
from luksrotd.bus.objects import OBJECT_MANAGER
from luksrotd.bus.transport import BATCH, BODY_LIMIT, FIELDS_LIMIT
from tests.bus.probes import PROBES, error_name, open_fds, spin
from tests.bus.toy import INTERFACE, PATH, serve, serve_plain
from tests.support.busclient import DAEMON, BusClient, Remote

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("bed")]
HANG_SECONDS = 60  # a probe that hangs is a failure, not a hung suite


@pytest.mark.parametrize("probe", PROBES)
async def test_luksrotd_stands(bed, probe):
    async with asyncio.timeout(HANG_SECONDS), serve() as service, BusClient() as client:
        assert await probe(service, client, bed)


@pytest.mark.parametrize("probe", PROBES)
async def test_plain_dbus_next_falls(bed, probe, caplog):
    async with asyncio.timeout(HANG_SECONDS), serve_plain() as service, BusClient() as client:
        assert not await probe(service, client, bed)


async def test_received_fds_are_closed_and_taken_ones_are_not(bed):
    async with serve() as service, BusClient() as client:
        reading, writing = os.pipe()
        os.write(writing, b"text")
        before = open_fds()
        assert await client.call(PATH, INTERFACE, "ReadFd", "h", [0], fds=[reading]) == ["text"]
        assert open_fds() == before
        await client.call(PATH, INTERFACE, "TakeFds", "(hh)", [[0, 1]], fds=[reading, writing])
        assert open_fds() == before + 2
        for fd in [*service.toy.taken, reading, writing]:
            os.close(fd)


async def test_one_fd_cannot_be_taken_twice(bed):
    async with serve(), BusClient() as client:
        before = open_fds()
        reading, writing = os.pipe()
        failed = await error_name(client.call(PATH, INTERFACE, "TakeFds", "(hh)", [[0, 0]], fds=[reading]))
        assert failed == "org.freedesktop.DBus.Error.InvalidArgs"
        os.close(reading)
        os.close(writing)
        # the handler took it once, so it is its own to close: only that one is left
        assert open_fds() == before + 1


async def test_returned_fds_arrive_and_are_closed_here(bed):
    async with serve(), BusClient() as client:
        before = open_fds()
        reply = await client.reply(PATH, INTERFACE, "OpenFd")
        assert os.read(reply.unix_fds[reply.body[0]], 100) == b"generated"
        assert open_fds() == before + 1  # the received one
        await client.reply(PATH, INTERFACE, "OpenFd", flags=MessageFlag.NONE)
        os.close(reply.unix_fds[0])


async def test_unwanted_replies_close_their_fds(bed):
    async with serve(), BusClient() as client:
        await client.call(PATH, INTERFACE, "Echo", "s", ["x"])  # who it is, is known then: calls are answered in order
        before = open_fds()
        await client.bus.send(client.message(PATH, INTERFACE, "OpenFd", flags=MessageFlag.NO_REPLY_EXPECTED))
        await client.call(PATH, INTERFACE, "Echo", "s", ["x"])
        assert open_fds() == before


async def test_fds_in_replies_to_us_are_closed(bed):
    """Debian 13's bus tells the credentials of every caller with a pidfd."""
    async with serve() as service, BusClient() as client:
        before = open_fds()
        reply = await service.bus.call(client.message(PATH, INTERFACE, "OpenFd"))
        assert reply.signature.startswith("h")
        assert open_fds() == before


async def test_fds_in_replies_that_are_asked_for_are_the_callers(bed):
    async with serve() as service, BusClient() as client:
        before = open_fds()
        fds = []
        reply = await service.bus.call(client.message(PATH, INTERFACE, "OpenFd"), fds=fds)
        assert os.read(fds[reply.body[0]].fd, 100) == b"generated"
        assert open_fds() == before + 1
        fds[0].close()
        assert open_fds() == before
        await service.bus.call(client.message(PATH, INTERFACE, "OpenFd"))
        assert open_fds() == before


async def test_a_result_that_does_not_fit_is_an_internal_error(bed, caplog):
    async with serve(), BusClient() as client:
        assert await error_name(client.call(PATH, INTERFACE, "Misfit")) == "org.luksrotd1.Error.Internal"


async def test_calls_of_one_caller_are_limited(bed):
    async with serve() as service, BusClient() as client, BusClient() as other:
        for _ in range(200):
            message = client.message(PATH, INTERFACE, "Hang", flags=MessageFlag.NO_REPLY_EXPECTED)
            await client.bus.send(message)
        failed = await error_name(client.call(PATH, INTERFACE, "Echo", "s", ["x"]))
        assert failed == "org.freedesktop.DBus.Error.LimitsExceeded"
        assert await other.call(PATH, INTERFACE, "Echo", "s", ["x"]) == ["x"]
        assert len(service.toy.tasks) == 128


async def test_calls_of_one_user_are_limited_over_all_connections(bed):
    nobody, other = (bed.user(name).pw_uid for name in ("nobody", "games"))
    async with serve(calls=2) as service, BusClient() as root:
        remotes = [Remote(bed, uid) for uid in (nobody, nobody, nobody, other)]
        try:
            for remote in remotes[:2]:
                service.toy.entered.clear()
                remote.send(PATH, INTERFACE, "Hang")
                await service.toy.entered.wait()
            echo = (PATH, INTERFACE, "Echo", "s", ["x"])
            assert await error_name(remotes[2].call(*echo)) == "org.freedesktop.DBus.Error.LimitsExceeded"
            for _ in range(3):
                assert await remotes[3].call(*echo) == ["x"]
            for _ in range(3):
                root.bus.send(root.message(PATH, INTERFACE, "Hang", flags=MessageFlag.NO_REPLY_EXPECTED))
            assert await root.call(*echo) == ["x"]
            service.toy.tasks[0].cancel()
            await asyncio.wait([service.toy.tasks[0]])
            assert await remotes[2].call(*echo) == ["x"]
        finally:
            for remote in remotes:
                remote.close()


async def test_no_question_is_lost_because_there_are_many(bed):
    """The bus refuses a connection its 129th call that has no reply yet."""
    async with serve(), BusClient() as first, BusClient() as second:
        for client in (first, second):
            await client.call(PATH, INTERFACE, "Echo", "s", ["known"])
        os.kill(bed.polkitd_pid, signal.SIGSTOP)
        try:
            calls = [
                asyncio.ensure_future(client.call(PATH, INTERFACE, "Rotate", "sa{sv}", ["x", {}]))
                for client in (first, second)
                for _ in range(100)
            ]
            await first.call(PATH, INTERFACE, "Echo", "s", ["behind its calls"])
            await second.call(PATH, INTERFACE, "Echo", "s", ["behind its calls"])
        finally:
            os.kill(bed.polkitd_pid, signal.SIGCONT)
        assert await asyncio.gather(*calls) == [["rotated x"]] * 200


async def test_closing_answers_what_is_under_way(bed):
    async with BusClient() as client:
        async with serve() as service:
            hanging = asyncio.ensure_future(client.reply(PATH, INTERFACE, "Hang"))
            await service.toy.entered.wait()
        reply = await hanging
        assert reply.error_name == "org.luksrotd1.Error.Cancelled"
        assert reply.body[0].endswith("(device: unknown-reconcile-needed)")


async def test_a_giant_header_is_not_parsed_but_answered(bed):
    """Nothing but the length of the whole message limits an object path; dbus-next takes seconds for a long one."""
    async with serve() as service, BusClient() as client:
        parsed = []
        service.bus._objects.find = lambda message, find=service.bus._objects.find: (
            parsed.append(len(message.path)) or find(message)
        )
        reading, writing = os.pipe()
        before = open_fds()
        for path, body in (
            ("/a" * FIELDS_LIMIT, "x"),
            (PATH, "x" * BODY_LIMIT),
            ("/a" * FIELDS_LIMIT, "x" * BODY_LIMIT),
        ):
            reply = await client.reply(path, INTERFACE, "Echo", "s", [body], fds=[reading])
            assert reply.error_name == "org.freedesktop.DBus.Error.LimitsExceeded"
        await client.reply("/a" * (FIELDS_LIMIT // 4), INTERFACE, "Echo", "s", ["x"])
        assert parsed == [FIELDS_LIMIT // 2]
        assert await client.call(PATH, INTERFACE, "Echo", "s", ["still there"]) == ["still there"]
        assert open_fds() == before
        os.close(reading)
        os.close(writing)


async def test_long_answers_share_the_loop(bed, monkeypatch):
    """As many in a turn as fit in its time: one, if each takes all of it."""
    monkeypatch.setattr(connection, "TURN_SECONDS", 0.0)
    async with serve() as service, BusClient() as client:
        turns = []
        handled = 0
        answer = service.bus._on_message

        def count(*arguments, **keywords):
            nonlocal handled
            handled += 1
            answer(*arguments, **keywords)

        async def other():
            while True:
                turns.append(handled)
                await asyncio.sleep(0)

        service.bus._on_message = count
        counting = asyncio.ensure_future(other())
        await asyncio.gather(
            *(client.call("/org/luksrotd1", OBJECT_MANAGER, "GetManagedObjects") for _ in range(BATCH))
        )
        counting.cancel()
        assert max(after - before for before, after in itertools.pairwise(turns)) == 1


async def test_the_bus_ending_fails_pending_calls_and_is_noticed(bed, tmp_path):
    """A bus of its own, because the others still need theirs."""
    config = tmp_path / "bus.conf"
    config.write_text(
        f"<busconfig><type>custom</type><listen>unix:path={bed.dir}/short-lived</listen>"
        '<policy context="default"><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>'
    )
    argv = ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address"]
    daemon = bed.spawn(argv, stdout=subprocess.PIPE, text=True)
    address = (await asyncio.to_thread(daemon.stdout.readline)).strip()
    bus, peer = await Bus(address=address).connect(), await Bus(address=address).connect()
    pending = asyncio.ensure_future(
        bus.call(Message(destination=peer.unique_name, path="/", interface="x.y", member="Z"))
    )
    os.kill(daemon.pid, signal.SIGSTOP)
    await spin()
    os.kill(daemon.pid, signal.SIGKILL)
    with pytest.raises(ConnectionError):
        await bus.wait_for_disconnect()
    with pytest.raises(ConnectionError):
        await pending
    with pytest.raises(ConnectionError):
        await bus.send(Message(destination=DAEMON, path="/", member="Late"))
    bed.end(daemon)
    with pytest.raises(ConnectionError):
        await peer.wait_for_disconnect()
    with pytest.raises(OSError, match=r"."):
        await Bus(address=address).connect()
