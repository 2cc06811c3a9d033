# SPDX-License-Identifier: GPL-2.0-or-later
"""``ports.ShadowStore`` and ``ports.Shadow``, simulated and in memfds."""

import os
import resource
import subprocess
import sys

import pytest

from luksrotd.errors import EngineError, Internal
from luksrotd.host.shadow import MemfdShadows
from luksrotd.luks2.areas import Extent
from tests.contract.conftest import PASSPHRASE, run
from tests.support.simshadow import SimShadows

MIB = 1024 * 1024
pytestmark = pytest.mark.usefixtures("no_leaked_descriptors")


@pytest.fixture(params=[SimShadows, MemfdShadows], ids=["sim", "memfd"])
def store(request):
    return request.param()


@pytest.fixture
def shadow(store):
    shadow = store.create(16 * MIB + 512)
    yield shadow
    shadow.close()


def test_it_is_zeros_at_first(shadow):
    assert shadow.length == 16 * MIB + 512
    assert shadow.read(0, MIB) == bytes(MIB)
    assert shadow.read(16 * MIB, 512) == bytes(512)
    assert tuple(shadow.data_extents()) == ()


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (4095, 2), (12288, 16384), (16 * MIB + 500, 12), (5, 0)])
def test_what_is_written_is_read(shadow, offset, length):
    data = os.urandom(length)
    shadow.write(offset, data)
    assert shadow.read(offset, length) == data
    around = shadow.read(max(offset - 4096, 0), min(offset, 4096))
    assert around == bytes(len(around))


def test_clear_makes_it_all_zeros_again(shadow):
    shadow.write(MIB + 100, b"old secret")
    shadow.clear()
    assert shadow.length == 16 * MIB + 512
    assert shadow.read(MIB, 4096) == bytes(4096)
    shadow.write(0, b"new")
    assert shadow.read(0, 4) == b"new\0"


def test_data_extents_cover_what_was_written_and_little_more(shadow):
    shadow.write(0, b"a" * 32768)
    shadow.write(MIB + 100, b"b")
    shadow.write(16 * MIB + 511, b"c")
    assert tuple(shadow.data_extents()) == (Extent(0, 32768), Extent(MIB, 4096), Extent(16 * MIB, 512))


def test_everything_may_be_data(store):
    shadow = store.create(8192)
    shadow.write(0, b"x" * 8192)
    assert tuple(shadow.data_extents()) == (Extent(0, 8192),)
    shadow.close()


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (16 * MIB + 512, 1), (0, 16 * MIB + 513), (0, -1)])
def test_beside_the_shadow_is_a_bug(shadow, offset, length):
    with pytest.raises(Internal):
        shadow.read(offset, length)
    if length > 0:
        with pytest.raises(Internal):
            shadow.write(offset, bytes(length))


def test_a_closed_shadow_is_closed(store):
    shadow = store.create(4096)
    shadow.close()
    shadow.close()
    for use in (lambda: shadow.read(0, 1), lambda: shadow.write(0, b"x")):
        with pytest.raises(Internal, match="closed"):
            use()


@pytest.mark.parametrize("length", [0, -1])
def test_there_is_no_empty_shadow(store, length):
    with pytest.raises(Internal):
        store.create(length)


# -- only the real one -------------------------------------------------------------------------------------------


def test_no_descriptor_no_shadow():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        with pytest.raises(EngineError, match="cannot create a shadow"):
            MemfdShadows().create(4096)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_child_sees_it_only_when_it_is_given():
    shadow = MemfdShadows().create(8192)
    shadow.write(4096, b"given")
    program = f"import os; fd = os.open('/proc/self/fd/{shadow.fd}', os.O_RDWR); print(os.pread(fd, 5, 4096))"
    command = [sys.executable, "-c", program + "; os.pwrite(fd, b'taken', 4096)"]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    done = subprocess.run(command, capture_output=True, check=True, pass_fds=[shadow.fd])
    assert done.stdout == b"b'given'\n"
    assert shadow.read(4096, 5) == b"taken"
    shadow.close()


def test_nobody_can_change_its_length():
    shadow = MemfdShadows().create(8192)
    for length in (4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(shadow.fd, length)
    shadow.close()


def test_cryptsetup_works_on_it(luks2_image):
    """Only the two copies are in it; libcryptsetup writes a keyslot to it and the image stays as it was."""
    before = luks2_image.read_bytes()
    shadow = MemfdShadows().create(16 * MIB)
    shadow.write(0, before[: 288 * 1024])  # the copies and the area of the first keyslot
    cheap = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "-", "--keyfile-size", "8")
    command = ("cryptsetup", "luksAddKey", "--batch-mode", *cheap, f"/proc/self/fd/{shadow.fd}", "/dev/stdin")
    done = subprocess.run(
        command, input=PASSPHRASE + b"another", capture_output=True, pass_fds=[shadow.fd], check=False
    )
    assert done.returncode == 0, done.stderr
    assert shadow.read(0, 32768) != before[:32768]
    assert luks2_image.read_bytes() == before
    assert run("cryptsetup", "isLuks", str(luks2_image)) == ""
    shadow.close()
