# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian with our package installed, and a volume."""

import subprocess

import pytest

from tests.beds import roots
from tests.beds.container import Container
from tests.beds.waiting import until
from tests.support import makeimage
from tests.support.daemon_process import OLD, PREFIX, Disk
from tests.support.kernel import LoopDevice

#: Keys that cost nothing to guess, and so no time to test with.
FAST_KEYS = {"/etc/luksrotd/luksrotd.conf.d/50-bed.conf": "[KeyDerivation]\nType=pbkdf2\nIterations=1000\n"}


@pytest.fixture(scope="session", params=roots.RELEASES)
def release(request):
    """Each release of Debian in turn."""
    return request.param


@pytest.fixture(scope="module")
def loop_volume(tmp_path_factory):
    """A loop device with a LUKS2 volume on it, whose keyslot 0 ``OLD`` opens.  To be bound into a container."""
    image = makeimage.make_image(tmp_path_factory.mktemp("volume") / f"{PREFIX}disk.img", key=OLD)
    with LoopDevice(image) as loop:
        yield loop


@pytest.fixture(scope="module")
def container(release, loop_volume):
    """A booted Debian with our package, and the volume."""
    with Container(roots.installed(release), devices=[loop_volume.path], files=FAST_KEYS) as container:
        yield container


@pytest.fixture
def volume(loop_volume, container):
    """The volume as a new one; the daemon knows it."""
    return renewed(container, loop_volume)


def renewed(container, loop):
    """The volume as ``anew`` makes it, which the container's daemon knows; /root/old.key has ``OLD``."""
    disk = anew(loop)
    until(lambda: knows(container, disk), "the daemon knows the volume")
    container.put("/root/old.key", OLD.decode(), mode=0o600)
    return disk


def anew(loop):
    """The volume with another UUID and but one keyslot, which ``OLD`` opens."""
    image = makeimage.make_image(loop.image.with_suffix(".new"), key=OLD)
    subprocess.run(["dd", f"if={image}", f"of={loop.path}", "bs=1M", "status=none"], check=True)
    return Disk(loop)


def knows(container, disk):
    """Whether the daemon has the volume on the bus."""
    objects = container.run("busctl", "--list", "tree", "org.luksrotd1", check=False).stdout
    return disk.path in objects.split()
