# SPDX-License-Identifier: GPL-2.0-or-later
"""Descriptors that are no secrets: each gets an error, and costs the daemon nothing."""

import asyncio
import fcntl
import os
import socket
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from dbus_next.signature import Variant

from luksrotd import names
from tests.integration.test_api import DEVICE, ERROR, INVALID, JOB
from tests.integration.test_jobs import until, workers_of
from tests.support.busclient import CallFailed
from tests.support.daemon_process import FAST, OLD, ended, memfd, start

pytestmark = pytest.mark.asyncio
MIB = 1024 * 1024


def path(name, flags=os.O_RDONLY):
    """What opens such a descriptor; it is closed in the end."""

    def make(stack):
        fd = os.open(name, flags | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        return fd

    return make


def huge_memfd(stack):
    """Reads as zeros for ever and ever."""
    fd = os.memfd_create("huge")
    os.ftruncate(fd, 1 << 40)
    stack.callback(os.close, fd)
    return fd


def one_byte_too_long(stack):
    fd = os.memfd_create("long")
    os.ftruncate(fd, 8 * MIB + 1)
    stack.callback(os.close, fd)
    return fd


def growing_memfd(stack):
    """Somebody else goes on writing into it, faster than it can be read."""
    fd, stopped = os.memfd_create("growing"), threading.Event()
    os.pwrite(fd, bytes(MIB), 8 * MIB)

    def grow():
        end = 9 * MIB
        while not stopped.wait(0.001):
            os.ftruncate(fd, end := end + MIB)

    thread = threading.Thread(target=grow)
    thread.start()
    stack.callback(os.close, fd)
    stack.callback(thread.join)
    stack.callback(stopped.set)
    return fd


def empty_memfd(stack):
    fd = os.memfd_create("empty")
    stack.callback(os.close, fd)
    return fd


def eventfd(stack):
    fd = os.eventfd(5)
    stack.callback(os.close, fd)
    return fd


def pidfd(stack):
    fd = os.pidfd_open(os.getpid())
    stack.callback(os.close, fd)
    return fd


def endless_pipe(stack):
    """Full, and goes on being filled: the writer never stops."""
    out, into = os.pipe2(os.O_CLOEXEC)
    fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, MIB)

    def pour():
        try:
            while True:
                os.write(into, bytes(65536))
        except BrokenPipeError:
            os.close(into)

    thread = threading.Thread(target=pour)
    thread.start()
    stack.callback(thread.join)
    stack.callback(os.close, out)  # before that
    return out


def listening_socket(stack):
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind("")
    listener.listen()
    return listener.fileno()


def written_by_nobody(stack):
    """A pipe whose writer does nothing."""
    out, into = os.pipe2(os.O_CLOEXEC)
    stack.callback(os.close, out)
    stack.callback(os.close, into)
    os.write(into, b"some")
    return out


def silent_socket(stack):
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    stack.enter_context(theirs)
    ours.sendall(b"some")
    return theirs.fileno()


def sending_end(stack):
    """The end of a pipe that can only be written to."""
    out, into = os.pipe2(os.O_CLOEXEC)
    stack.callback(os.close, out)
    stack.callback(os.close, into)
    return into


HOSTILE = {
    "directory": path("/"),
    "endless device": path("/dev/zero"),
    "empty device": path("/dev/null"),
    "full device, write only": path("/dev/full", os.O_WRONLY),
    "path only": path("/etc/passwd", os.O_PATH),
    "path of a symlink": path("/proc/self/exe", os.O_PATH | os.O_NOFOLLOW),
    "write only": path("/dev/null", os.O_WRONLY),
    "process memory": path("/proc/self/mem"),
    "its own file table": path("/proc/self/fd"),
    "huge memfd": huge_memfd,
    "one byte too long": one_byte_too_long,
    "growing memfd": growing_memfd,
    "empty memfd": empty_memfd,
    "eventfd": eventfd,
    "pidfd": pidfd,
    "endless pipe": endless_pipe,
    "listening socket": listening_socket,
    "sending end": sending_end,
}
#: These cost the worker all the time that it gives a secret to come.
SLOW = {"silent pipe": written_by_nobody, "silent socket": silent_socket}


@contextmanager
def made(maker):
    with ExitStack() as stack:
        yield maker(stack)


def open_files(daemon):
    """What the daemon has open, without its sockets' numbers."""
    links = []
    for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
        try:
            links.append(str(link.readlink()).split(":[")[0])
        except FileNotFoundError:
            continue
    return sorted(links)


async def verified(client, path, credential, fds):
    """The error of VerifyKey."""
    with pytest.raises(CallFailed) as caught:
        await client.call(path, DEVICE, "VerifyKey", "sa{sv}a{sv}", ["", credential, {}], fds=fds)
    return caught.value


async def check_alive(client, volume):
    """The daemon does what it is there for."""
    (matches,) = await with_secret(client, volume, OLD)
    assert matches is False


async def with_secret(client, volume, secret):
    fd = memfd(secret)
    try:
        body = ["", {"fd": Variant("h", 0)}, {}]
        return await client.call(volume.path, DEVICE, "VerifyKey", "sa{sv}a{sv}", body, fds=[fd])
    finally:
        os.close(fd)


async def test_each_gets_an_error_and_costs_nothing(enrolled, daemon, client):
    await check_alive(client, enrolled)
    before, headers = open_files(daemon), enrolled.headers()
    for name, maker in HOSTILE.items():
        with made(maker) as fd:
            error = await verified(client, enrolled.path, {"fd": Variant("h", 0)}, [fd])
        assert error.name == ERROR + "SecretRejected", name
        assert error.text.startswith("cannot use the secret 'unlock': "), name
    await check_alive(client, enrolled)
    await until(lambda: open_files(daemon) == before)
    await until(lambda: not workers_of(daemon.pid))
    assert enrolled.headers() == headers


ODD = ("directory", "endless device", "path only", "huge memfd", "empty memfd", "eventfd")


async def test_as_a_pin_they_do_no_more(enrolled, daemon, client):
    await check_alive(client, enrolled)
    before = open_files(daemon)
    for name in ODD:
        with made(HOSTILE[name]) as fd:
            described = {"token": Variant("i", 0), "pin-fd": Variant("h", 0)}
            error = await verified(client, enrolled.path, described, [fd])
        assert error.name == ERROR + "SecretRejected", name
        assert error.text.startswith("cannot use the secret 'unlock PIN': "), name
    await until(lambda: open_files(daemon) == before)


async def test_as_a_new_secret_they_fail_the_job(enrolled, daemon, client):
    await check_alive(client, enrolled)
    before, headers = open_files(daemon), enrolled.headers()
    for name in ODD:
        with made(HOSTILE[name]) as fd, made(_good) as good:
            body = ["", {"fd": Variant("h", 0)}, {"fd": Variant("h", 1)}, FAST]
            (job,) = await client.call(enrolled.path, DEVICE, "Rotate", "sa{sv}a{sv}a{sv}", body, fds=[good, fd])
            done = await ended(client, job)
            assert (done["State"], done["ErrorName"], done["Outcome"]) == (
                "failed", ERROR + "SecretRejected", "unchanged",
            ), name  # fmt: skip
    await until(lambda: open_files(daemon) == before)
    assert enrolled.headers() == headers


def _good(stack):
    fd = memfd(OLD)
    stack.callback(os.close, fd)
    return fd


async def test_a_secret_that_never_ends_is_waited_for_no_longer_than_any(enrolled, daemon, client):
    """The daemon serves everybody else meanwhile."""
    await check_alive(client, enrolled)
    before = open_files(daemon)
    with ExitStack() as stack:
        calls = []
        for maker in SLOW.values():
            fd = stack.enter_context(made(maker))
            calls.append(asyncio.create_task(verified(client, enrolled.path, {"fd": Variant("h", 0)}, [fd])))
        assert not [call for call in calls if call.done()]
        assert await client.call(names.ROOT_PATH, names.MANAGER_INTERFACE, "GetDevices", "a{sv}", [{}])
        for error in await asyncio.gather(*calls):
            assert error.name == ERROR + "SecretRejected"
            assert "its end did not come in time" in error.text
    await check_alive(client, enrolled)
    await until(lambda: open_files(daemon) == before)


async def test_descriptors_that_did_not_come(enrolled, daemon, client):
    """An index is no descriptor: the daemon's own must never be taken for one."""
    before = open_files(daemon)
    for index in (0, 1, 7, 2**31, 2**32 - 1):
        for described in ({"fd": Variant("h", index)}, {"token": Variant("i", 0), "pin-fd": Variant("h", index)}):
            assert (await verified(client, enrolled.path, described, [])).name == INVALID
    with made(_good) as fd:
        body = ["", {"fd": Variant("h", 0)}, {"fd": Variant("h", 0)}, {}]
        with pytest.raises(CallFailed) as caught:
            await client.call(enrolled.path, DEVICE, "Rotate", "sa{sv}a{sv}a{sv}", body, fds=[fd])
        assert caught.value.name == INVALID
    await until(lambda: open_files(daemon) == before)


def overwrite(fd):
    Path(f"/proc/self/fd/{fd}").write_bytes(b"x")


async def test_a_generated_key_comes_sealed_and_read_only(enrolled, client):
    job = await start(client, enrolled.path, new=None)
    reply = await client.reply(job, JOB, "TakeKey", "a{sv}", [{}])
    (fd,) = reply.unix_fds
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        for seal in (fcntl.F_SEAL_WRITE, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SEAL):
            assert seals & seal
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        with pytest.raises(PermissionError):
            overwrite(fd)
        assert len(os.pread(fd, 100, 0)) == 71
    finally:
        os.close(fd)
    await client.call(job, JOB, "ConfirmKey", "a{sv}", [{}])
    assert (await ended(client, job))["State"] == "finished"
