# SPDX-License-Identifier: GPL-2.0-or-later
"""Real things to hold the ports against: loop devices, LUKS2 images, other processes that hold locks.

Everything that is started or attached here is ended and detached here, by its own number.
"""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PASSPHRASE = b"contract"
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNS = 0x00020000
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent():
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run(*command, data=b""):
    done = subprocess.run(command, input=data, capture_output=True, check=False, preexec_fn=die_with_parent)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout.decode().strip()


@contextmanager
def loop_device(image, sector_size=512, options=()):
    node = run("losetup", "--find", "--show", "--sector-size", str(sector_size), *options, str(image))
    try:
        yield node
    finally:
        subprocess.run(["losetup", "--detach", node], check=False, capture_output=True)


def delete_partitions(disk):
    """Of a loop device; a udevd that has one open, to look what is on it, lets go of it soon."""
    deadline = time.monotonic() + 30
    name = Path(disk).name
    while list(Path(f"/sys/block/{name}").glob(f"{name}p*")):
        subprocess.run(["partx", "--delete", disk], check=False, capture_output=True)
        assert time.monotonic() < deadline, f"the partitions of {disk} stay busy"
        time.sleep(0.01)


@contextmanager
def mounted(kind, where, options):
    where.mkdir()
    run("mount", "-t", kind, "-o", options, "contract", str(where))
    try:
        yield where
    finally:
        # Somebody's udevd may still have the loop device on it open.
        run("umount", "--lazy", str(where))


@contextmanager
def child(*command, **streams):
    """A child process that does not outlive the block."""
    process = subprocess.Popen(command, preexec_fn=die_with_parent, **streams)  # noqa: PLW1509 -- no threads here
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()


_HOLD = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | (os.O_CREAT if sys.argv[3] == "create" else 0), 0o600)
fcntl.flock(fd, int(sys.argv[2]))
os.write(1, b"held")
os.read(0, 1)
"""


@contextmanager
def flocked(path, operation=fcntl.LOCK_EX, *, create=False):
    """Another process holds flock(2) on ``path``; yields a function that makes it let go."""
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    arguments = (str(path), str(int(operation)), "create" if create else "")
    with child(sys.executable, "-c", _HOLD, *arguments, **streams) as process:
        assert process.stdout.read(4) == b"held"

        def release():
            process.stdin.close()
            process.wait()

        yield release


@pytest.fixture
def luks2_image(tmp_path):
    """A LUKS2 image with the default geometry and a keyslot that costs nothing to open."""
    image = tmp_path / "luks2.img"
    with image.open("wb") as file:
        file.truncate(20 * 1024 * 1024)
    format_luks2(image)
    return image


def format_luks2(path):
    cheap = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    run("cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", *cheap, str(path), "-", data=PASSPHRASE)


def open_descriptors():
    """What each of our descriptors leads to."""
    links = {}
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that iterdir() itself used
            links[int(entry.name)] = str(entry.readlink())
    return links


@pytest.fixture
def no_leaked_descriptors():
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.fixture
def private_run():
    """A /run of our own, empty, in mount and network namespaces of our own, until the test ends.

    The network namespace keeps out what other udev daemons on the machine broadcast, and ours in.
    """
    directory = Path.cwd()
    kinds = {"mnt": _CLONE_NEWNS, "net": _CLONE_NEWNET}
    outside = {kind: os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in kinds}
    _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET))
    try:
        run("mount", "--make-rprivate", "/")
        run("mount", "-t", "tmpfs", "-o", "mode=755", "contract", "/run")
        yield Path("/run")
    finally:
        for kind, fd in outside.items():
            _check(_libc.setns(fd, kinds[kind]))
            os.close(fd)
        os.chdir(directory)


@contextmanager
def other_network():
    """A network namespace of one's own inside, for the calling thread and the processes that it starts."""
    outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.unshare(_CLONE_NEWNET))
        yield
        _check(_libc.setns(outside, _CLONE_NEWNET))
    finally:
        os.close(outside)


def _check(result):
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@pytest.fixture
def udevd(private_run):
    """A systemd-udevd of our own; pyudev sees only what this one says."""
    log = private_run / "udevd.log"
    with log.open("wb") as output, child("/lib/systemd/systemd-udevd", stdout=output, stderr=output) as process:
        while not (private_run / "udev" / "control").exists():
            assert process.poll() is None, log.read_text()
            time.sleep(0.002)
        yield process
        process.terminate()
        process.wait()
