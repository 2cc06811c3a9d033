# SPDX-License-Identifier: GPL-2.0-or-later
"""Secrets in memfds."""

import fcntl
import mmap
import os
import re
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from luksrotd.errors import SecretRejected
from luksrotd.host.sealed import SecretMemfd

pytestmark = pytest.mark.usefixtures("no_leaked_descriptors")
SECRET = b"correct horse battery staple"


@contextmanager
def limited(which, soft):
    before = resource.getrlimit(which)
    resource.setrlimit(which, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


def mappings():
    """What /proc/self/smaps says of the mappings of secrets: kB locked, and the flags."""
    found = re.findall(
        r"memfd:luksrotd-secret.*?\nLocked: +(\d+) kB\n.*?VmFlags: ([^\n]*)", Path("/proc/self/smaps").read_text(), re.S
    )
    return [(int(locked), flags.split()) for locked, flags in found]


def test_the_secret_moves_into_it():
    secret = bytearray(SECRET)
    with SecretMemfd.from_bytes(secret) as memfd:
        assert secret == bytes(len(SECRET))
        assert memfd.sealed
        assert memfd.size == len(SECRET)
        assert os.pread(memfd.fd, 100, 0) == SECRET
        assert not os.get_inheritable(memfd.fd)


@pytest.mark.parametrize("length", [0, 1, 4096, 1024 * 1024 + 1])
def test_any_length_fits(length):
    secret = bytearray(os.urandom(length))
    copy = bytes(secret)
    with SecretMemfd.from_bytes(secret) as memfd:
        assert os.pread(memfd.fd, length + 1, 0) == copy


def test_nobody_can_change_what_is_sealed():
    with SecretMemfd.from_bytes(bytearray(SECRET)) as memfd:
        for change in (
            lambda: os.pwrite(memfd.fd, b"x", 0),
            lambda: os.ftruncate(memfd.fd, 1),
            lambda: os.ftruncate(memfd.fd, 100),
            lambda: fcntl.fcntl(memfd.fd, fcntl.F_ADD_SEALS, 0),
            lambda: mmap.mmap(memfd.fd, 4, mmap.MAP_SHARED, mmap.PROT_WRITE),
        ):
            with pytest.raises(PermissionError):
                change()
        assert not memfd.wipe()
        assert os.pread(memfd.fd, 100, 0) == SECRET


def test_it_is_locked_in_memory_and_left_out_of_core_dumps():
    with SecretMemfd.from_bytes(bytearray(SECRET)) as memfd:
        assert memfd.locked
        ((locked, flags),) = mappings()
        assert locked == 4
        assert {"lo", "dd"} <= set(flags)
    assert mappings() == []


def test_without_permission_to_lock_it_works_all_the_same():
    with limited(resource.RLIMIT_MEMLOCK, 0), _without_cap_ipc_lock():
        memfd = SecretMemfd.from_bytes(bytearray(SECRET))
    with memfd:
        assert os.pread(memfd.fd, 100, 0) == SECRET
        assert not memfd.locked


@contextmanager
def _without_cap_ipc_lock():
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_the_argument_is_zeroed_when_it_fails_too():
    secret = bytearray(SECRET)
    with limited(resource.RLIMIT_NOFILE, 3), pytest.raises(SecretRejected, match=r"^cannot "):
        SecretMemfd.from_bytes(secret)
    assert secret == bytes(len(SECRET))
    secret = bytearray(SECRET)
    with limited(resource.RLIMIT_FSIZE, 8), pytest.raises(SecretRejected, match=r"^cannot keep a secret"):
        SecretMemfd.from_bytes(secret)
    assert secret == bytes(len(SECRET))


def test_a_secret_that_somebody_else_wrote_is_sealed_and_handed_on():
    """As the worker generates one: into the descriptor, from the start, with write(2)."""
    with SecretMemfd() as memfd:
        assert not memfd.lock()
        os.write(memfd.fd, SECRET)
        memfd.seal()
        assert memfd.sealed
        assert memfd.locked
        one, two = memfd.reader(), memfd.reader()
        try:
            assert os.read(one, 7) == SECRET[:7]
            assert os.read(two, 100) == SECRET
            assert os.read(one, 100) == SECRET[7:]
            assert fcntl.fcntl(one, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        finally:
            os.close(one)
            os.close(two)


def test_it_cannot_be_sealed_while_somebody_could_still_write():
    with SecretMemfd() as memfd:
        os.write(memfd.fd, SECRET)
        with mmap.mmap(memfd.fd, len(SECRET)), pytest.raises(SecretRejected, match="cannot seal"):
            memfd.seal()
        memfd.seal()


def test_wiping_reaches_every_descriptor():
    with SecretMemfd() as memfd:
        os.write(memfd.fd, SECRET)
        reader = memfd.reader()
        with mmap.mmap(reader, len(SECRET), mmap.MAP_SHARED, mmap.PROT_READ) as seen:
            other = os.dup(memfd.fd)
            os.write(other, b"!")
            assert memfd.wipe()
            assert memfd.size == 0
            os.ftruncate(memfd.fd, len(SECRET))
            assert seen[:] == bytes(len(SECRET))
        os.close(other)
        os.close(reader)


def test_wiping_zeroes_the_memory_and_does_not_only_let_go_of_it():
    """A pipe that the memfd was spliced into refers to its very page, which outlives the truncation."""
    take, put = os.pipe2(os.O_CLOEXEC)
    with SecretMemfd() as memfd:
        os.write(memfd.fd, SECRET)
        assert os.splice(memfd.fd, put, len(SECRET), offset_src=0) == len(SECRET)
        memfd.wipe()
    assert os.read(take, 100) == bytes(len(SECRET))
    os.close(take)
    os.close(put)


def test_closing_wipes_what_is_not_sealed_and_is_idempotent():
    memfd = SecretMemfd()
    os.write(memfd.fd, SECRET)
    reader = memfd.reader()
    memfd.close()
    memfd.close()
    assert os.pread(reader, 100, 0) == b""
    os.close(reader)
