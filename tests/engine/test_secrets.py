# SPDX-License-Identifier: GPL-2.0-or-later
"""Secrets of every kind, read by a real worker; the passphrase of the image says whether all bytes arrived."""

import asyncio
import fcntl
import os
import re
import socket

import pytest

from luksrotd.cryptsetup.memory import SafeMemory
from luksrotd.errors import EngineError, SecretRejected
from luksrotd.host.worker import Deadlines, WorkerEngine
from luksrotd.ports import GenerateInto, SecretFd
from luksrotd.rotation.edits import PBKDF_FOR_RANDOM_KEYS, AddKeyslot
from luksrotd.secret import FORMATTED_LENGTH, RANDOM_BYTES, write_recovery_key
from tests.engine.shadow import memfd, shadow_of
from tests.support.makeimage import cryptsetup_opens, make_image

#: Longer than the first read, with everything that a careless reader would cut off or stop at.
SECRET = b"\0\n" + bytes(range(256)) * 40 + b"\r\n\n"


@pytest.fixture
def odd(tmp_path):
    shadow = shadow_of(make_image(tmp_path / "odd", key=SECRET, keyslots_size=1024 * 1024))
    yield shadow
    shadow.close()


@pytest.fixture
def fds():
    """Descriptors to be closed after the test."""
    opened = []
    yield opened
    for fd in opened:
        os.close(fd)


async def opened_by(shadow, source, **deadlines):
    async with WorkerEngine(Deadlines(**deadlines)).session(shadow, {"unlock": source}) as session:
        return await session.unlock()


async def rejected(shadow, fd, limit=100, **deadlines):
    with pytest.raises(SecretRejected) as caught:
        await opened_by(shadow, SecretFd(fd, limit), **deadlines)
    return caught.value.message


def full_pipe(content=SECRET):
    """A pipe with all of ``content`` and an end."""
    out, into = os.pipe()
    fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 2 * len(content))
    os.write(into, content)
    os.close(into)
    return out


def full_socket():
    ours, theirs = socket.socketpair()
    ours.sendall(SECRET)
    ours.close()
    return theirs.detach()


def file_in(path, content):
    path.write_bytes(content)
    path.chmod(0o400)
    return os.open(path, os.O_RDONLY)


# -- accepted ----------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [full_pipe, full_socket, lambda: memfd(SECRET)], ids=["pipe", "socket", "memfd"])
async def test_bytes_are_taken_verbatim(odd, fds, kind):
    fds.append(kind())
    assert await opened_by(odd, SecretFd(fds[0])) == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("position", [0, 7, len(SECRET)])
async def test_file_is_read_from_its_start_and_the_shared_offset_stays(odd, fds, tmp_path, position):
    fds.append(file_in(tmp_path / "secret", SECRET))
    os.lseek(fds[0], position, os.SEEK_SET)
    assert await opened_by(odd, SecretFd(fds[0])) == 0
    assert os.lseek(fds[0], 0, os.SEEK_CUR) == position


@pytest.mark.asyncio
async def test_a_busy_daemon_has_high_descriptors(odd, fds):
    """Beyond what the worker may open itself: on Python 3.13 it closed them all, its control socket too."""
    fds.append(memfd(SECRET))
    fds.append(fcntl.fcntl(fds[0], fcntl.F_DUPFD_CLOEXEC, 300))
    fds += [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(100)]
    assert await opened_by(odd, SecretFd(fds[1])) == 0


@pytest.mark.asyncio
async def test_exactly_the_limit(odd, fds):
    fds += [memfd(SECRET), full_pipe()]
    for fd in fds:
        assert await opened_by(odd, SecretFd(fd, len(SECRET))) == 0


@pytest.mark.asyncio
async def test_pipe_that_fills_later_and_does_not_block(odd, fds):
    out, into = os.pipe2(os.O_NONBLOCK)
    fds.append(out)
    task = asyncio.create_task(opened_by(odd, SecretFd(out)))
    for start in range(0, len(SECRET), 1000):
        os.write(into, SECRET[start : start + 1000])
        await asyncio.sleep(0)
    os.close(into)
    assert await task == 0


@pytest.mark.asyncio
async def test_the_callers_standard_input(odd, fds):
    """Descriptor 0 becomes /dev/null in a worker, and is passed on all the same."""
    saved = os.dup(0)
    try:
        fds.append(memfd(SECRET))
        os.dup2(fds[0], 0)
        assert await opened_by(odd, SecretFd(0)) == 0
    finally:
        os.dup2(saved, 0)
        os.close(saved)


@pytest.mark.asyncio
async def test_one_memfd_as_two_secrets(odd, fds):
    fds.append(memfd(SECRET))
    both = {"unlock": SecretFd(fds[0]), "new": SecretFd(fds[0])}
    async with WorkerEngine().session(odd, both) as session:
        assert await session.opens(0, "unlock")
        assert await session.opens(0, "new")


# -- rejected ----------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("path", "flags", "why"),
    [
        ("/", os.O_RDONLY, "it is not a file, pipe or socket"),
        ("/dev/null", os.O_RDONLY, "it is empty"),
        ("/dev/zero", os.O_RDONLY, "it is longer than 100 bytes"),
        ("/dev/null", os.O_WRONLY, "it cannot be read: Bad file descriptor"),
        ("/etc/passwd", os.O_PATH, "it cannot be read: Bad file descriptor"),
    ],
)
async def test_odd_files(shadow, fds, path, flags, why):
    fds.append(os.open(path, flags))
    assert await rejected(shadow, fds[0]) == f"cannot use the secret 'unlock': {why}"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (memfd, "it is empty"),
        (lambda: memfd(b"x" * 101), "it is longer than 100 bytes"),
        (lambda: full_pipe(b"x" * 101), "it is longer than 100 bytes"),
        (lambda: full_pipe(b""), "it is empty"),
        (lambda: os.eventfd(5), "it is not a file, pipe or socket"),
        (lambda: socket.socket(socket.AF_UNIX).detach(), "it cannot be read: "),
    ],
    ids=["empty", "long", "long-pipe", "empty-pipe", "eventfd", "unconnected"],
)
async def test_odd_descriptors(shadow, fds, kind, why):
    fds.append(kind())
    assert (await rejected(shadow, fds[0])).startswith(f"cannot use the secret 'unlock': {why}")


@pytest.mark.asyncio
@pytest.mark.parametrize("content", [b"", b"some"])
async def test_pipe_without_an_end(shadow, fds, content):
    fds += os.pipe()
    os.write(fds[1], content)
    assert "its end did not come in time" in await rejected(shadow, fds[0], secret=0.1)


@pytest.mark.asyncio
async def test_descriptor_that_is_not_open(shadow, fds):
    fd = memfd()
    os.close(fd)
    assert "Bad file descriptor" in await rejected(shadow, fd)


# -- generated ---------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_generated_secret_opens_the_keyslot_and_differs_each_time(image, shadow, fds, tmp_path):
    fds += [memfd(b"the key of keyslot 0"), memfd(), memfd()]
    for number, fd in enumerate(fds[1:], 1):
        secrets = {"unlock": SecretFd(fds[0]), "new": GenerateInto(fd)}
        async with WorkerEngine().session(shadow, secrets) as session:
            await session.unlock()
            await session.apply([AddKeyslot(number, "new", PBKDF_FOR_RANDOM_KEYS)])
    # From where the offset is: whoever gets the descriptor reads the whole secret.
    keys = [os.read(fd, 1000) for fd in fds[1:]]
    result = shadow.save(tmp_path / "result")
    assert keys[0] != keys[1]
    for number, key in enumerate(keys, 1):
        assert re.fullmatch(rb"[cbdefghijklnrtuv]{8}(-[cbdefghijklnrtuv]{8}){7}", key)
        assert cryptsetup_opens(result, key, number)


@pytest.mark.asyncio
async def test_generated_secret_that_cannot_be_handed_back(shadow, fds):
    fds.append(os.open("/dev/null", os.O_RDONLY))
    with pytest.raises(EngineError, match=r"cannot hand back the generated secret: "):
        async with WorkerEngine().session(shadow, {"new": GenerateInto(fds[0])}):
            pass


def test_recovery_key_format():
    """By systemd 252's own decoder, bytes 00 01 … 1f are this key (systemd src/shared/recovery-key.c)."""
    text = bytearray(FORMATTED_LENGTH)
    write_recovery_key(memoryview(bytes(range(RANDOM_BYTES))), memoryview(text))
    assert text == b"cccbcdce-cfcgchci-cjckclcn-crctcucv-bcbbbdbe-bfbgbhbi-bjbkblbn-brbtbubv"


# -- the memory --------------------------------------------------------------------------------------------------


def test_memory_is_wiped_and_freed():
    memory = SafeMemory(64)
    assert bytes(memory.view()) == bytes(64)
    memory.view()[:] = b"x" * 64
    memory.resize(128)
    assert bytes(memory.view(0, 64)) == b"x" * 64
    memory.wipe()
    assert bytes(memory.view(0, 64)) == bytes(64)
    memory.close()
    memory.close()
    with pytest.raises(ValueError, match="freed"):
        memory.view()


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (0, 65), (5, 4), (65, None)])
def test_memory_has_bounds(start, end):
    with SafeMemory(64) as memory, pytest.raises(ValueError, match="not inside"):
        memory.view(start, end)


def test_memory_does_not_show_itself():
    with SafeMemory(8) as memory:
        memory.view()[:] = b"hunter22"
        assert "hunter" not in repr(memory) + str(memory)
