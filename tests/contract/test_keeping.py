# SPDX-License-Identifier: GPL-2.0-or-later
"""``SecretKeeper``: by splice(2), and simulated."""

import asyncio
import os
import socket
import threading
from contextlib import ExitStack, suppress

import pytest

from luksrotd.errors import SecretRejected
from luksrotd.host import keeping
from luksrotd.host.keeping import PipeKeeper
from luksrotd.ports import SecretFd
from tests.support.simkeeper import SimKeeper

pytestmark = pytest.mark.asyncio
SECRET = b"a secret\n"


@pytest.fixture(params=["real", "simulated"])
def keeper(request):
    return PipeKeeper(0.2) if request.param == "real" else SimKeeper()


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def a_pipe(stack, content=SECRET, *, ends=True):
    """The reading end of a pipe."""
    ours, theirs = os.pipe()
    stack.callback(os.close, ours)
    os.write(theirs, content)
    if ends:
        os.close(theirs)
    else:
        stack.callback(os.close, theirs)
    return ours


def open_fds():
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208 -- names are enough


async def rejected(keeper, source):
    """Keeping it is refused, and leaves nothing open."""
    before = open_fds()
    with ExitStack() as resources, pytest.raises(SecretRejected) as caught:
        await keeper.keep(source, resources)
    assert open_fds() == before
    return str(caught.value)


async def test_a_file_stays_what_it_is(keeper, stack, tmp_path):
    path = tmp_path / "key"
    path.write_bytes(SECRET)
    files = [os.open(path, os.O_RDONLY), os.memfd_create("key")]
    for fd in files:
        stack.callback(os.close, fd)
    for source in (SecretFd(files[0]), SecretFd(files[1], 7)):
        with ExitStack() as resources:
            assert await keeper.keep(source, resources) == source


async def test_what_was_in_a_pipe_can_be_read_as_often_as_one_likes(keeper, stack):
    before = open_fds()
    with ExitStack() as resources:
        ours = a_pipe(resources)
        kept = await keeper.keep(SecretFd(ours, 100), resources)
        assert kept.limit == 100
        assert [os.pread(kept.fd, 1000, 0) for _ in range(2)] == [SECRET, SECRET]
        assert os.read(ours, 1) == b"", "it is empty now"
    assert open_fds() == before


async def test_a_file_system_that_hangs_does_not_hold_up_the_loop(monkeypatch, tmp_path):
    alive, fstat = threading.Event(), os.fstat

    def hanging(fd):
        assert alive.wait(10)
        return fstat(fd)

    monkeypatch.setattr(keeping.os, "fstat", hanging)
    with ExitStack() as resources, (tmp_path / "key").open("wb") as file:
        keeping_it = asyncio.ensure_future(PipeKeeper().keep(SecretFd(file.fileno()), resources))
        await asyncio.sleep(0)
        alive.set()
        assert (await keeping_it).fd == file.fileno()


async def test_the_limit_is_what_may_be_in_it(keeper, stack):
    with ExitStack() as resources:
        kept = await keeper.keep(SecretFd(a_pipe(stack), len(SECRET)), resources)
        assert os.pread(kept.fd, 1000, 0) == SECRET
    await rejected(keeper, SecretFd(a_pipe(stack), len(SECRET) - 1))


async def test_an_empty_pipe_is_refused(keeper, stack):
    await rejected(keeper, SecretFd(a_pipe(stack, b"")))


async def test_a_pipe_that_does_not_end_is_refused(keeper, stack):
    await rejected(keeper, SecretFd(a_pipe(stack, ends=False)))


async def test_what_is_no_file_and_no_pipe_is_refused(keeper, stack, tmp_path):
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    stack.enter_context(theirs)
    others = [os.open("/dev/zero", os.O_RDONLY), os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)]
    for fd in others:
        stack.callback(os.close, fd)
    for fd in (ours.fileno(), *others):
        await rejected(keeper, SecretFd(fd))


async def test_the_end_of_a_pipe_that_is_written_to_is_refused(keeper, stack):
    ours, theirs = os.pipe()
    stack.callback(os.close, ours)
    stack.callback(os.close, theirs)
    await rejected(keeper, SecretFd(theirs))


# -- the real one ------------------------------------------------------------------------------------------------


async def test_a_secret_may_come_piece_by_piece_and_be_longer_than_a_pipe():
    secret = os.urandom(3 * 65536)
    ours, theirs = os.pipe()

    def write():
        with os.fdopen(theirs, "wb") as pipe:
            pipe.write(secret)

    writer = threading.Thread(target=write)
    writer.start()
    with ExitStack() as resources:
        resources.callback(os.close, ours)
        kept = await PipeKeeper().keep(SecretFd(ours), resources)
        assert os.pread(kept.fd, len(secret) + 1, 0) == secret
    writer.join()


async def test_a_flood_is_cut_off():
    ours, theirs = os.pipe()

    def write():
        with suppress(BrokenPipeError), os.fdopen(theirs, "wb") as pipe:
            while True:
                pipe.write(bytes(65536))

    writer = threading.Thread(target=write)
    writer.start()
    text = await rejected(PipeKeeper(), SecretFd(ours, 300_000))
    os.close(ours)
    writer.join()
    assert "longer than 300000 bytes" in text


async def test_who_no_longer_wants_it_leaves_nothing_behind(stack):
    ours = a_pipe(stack, ends=False)
    before = open_fds()
    with ExitStack() as resources:
        keeping = asyncio.ensure_future(PipeKeeper().keep(SecretFd(ours), resources))
        for _ in range(3):
            await asyncio.sleep(0)
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping
    assert open_fds() == before
    assert not asyncio.get_running_loop().remove_reader(ours)


async def test_the_secret_never_comes_by_this_process(stack, monkeypatch):
    monkeypatch.setattr(os, "read", None)
    monkeypatch.setattr(os, "pread", None)
    with ExitStack() as resources:
        kept = await PipeKeeper().keep(SecretFd(a_pipe(stack)), resources)
        assert os.fstat(kept.fd).st_size == len(SECRET)
