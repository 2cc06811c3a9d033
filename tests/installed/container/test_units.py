# SPDX-License-Identifier: GPL-2.0-or-later
"""The reconcile units on a booted system: their order, and volumes of which one fails."""

import subprocess
from contextlib import ExitStack

import pytest

from tests.beds import roots
from tests.beds.container import Container
from tests.support import makeimage
from tests.support.kernel import LoopDevice

DAEMON, BOOT = "luksrotd.service", "luksrotd-reconcile.service"
KEY = b"the first key"
SECOND_COPY = 16384
"""Bytes from the start of a volume, with the headers that the images have."""
IMAGE = "/srv/images/a b-c.img"


def instance(container, path):
    """The unit that reconciles this device or image alone."""
    words = ("--path", "--template=luksrotd-reconcile@.service", str(path))
    return container.run("systemd-escape", *words).stdout.strip()


def spoil(path):
    """Leave of the second copy of the header nothing."""
    with open(path, "r+b", buffering=0) as file:  # noqa: PTH123 - a device, without a buffer
        file.seek(SECOND_COPY)
        file.write(bytes(4096))


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Loop devices: one that cannot be written and one that can, both in need of repair, and one that needs none."""
    directory = tmp_path_factory.mktemp("volumes")
    images = {name: makeimage.make_image(directory / name, key=KEY) for name in ("failing", "mended", "clean")}
    spoil(images["failing"])
    spoil(images["mended"])
    with ExitStack() as stack:
        nodes = {name: stack.enter_context(LoopDevice(image)).path for name, image in images.items()}
        subprocess.run(["blockdev", "--setro", nodes["failing"]], check=True)
        stack.callback(subprocess.run, ["blockdev", "--setrw", nodes["failing"]], check=True)
        yield nodes


@pytest.fixture(scope="module")
def booted(release, volumes):
    spoil(volumes["mended"])
    with Container(roots.installed(release), devices=list(volumes.values())) as container:
        yield container


def test_a_device_that_fails_stops_neither_the_others_nor_the_boot(booted, volumes):
    said = booted.journal(BOOT)
    assert f"{volumes['failing']}: cannot open {volumes['failing']}: Read-only file system" in said
    assert f"{volumes['mended']}: repaired: the secondary header copy is not valid" in said
    assert f"{volumes['clean']}: clean" in said
    assert "volume reconciled" in said
    unit = booted.show(BOOT)
    assert (unit["ActiveState"], unit["Result"], unit["ExecMainStatus"]) == ("failed", "exit-code", "1")
    assert booted.show(DAEMON)["ActiveState"] == "active"
    assert booted.show("multi-user.target")["ActiveState"] == "active"


def test_reconcile_comes_after_the_devices_and_before_the_daemon(booted):
    moments = [
        booted.show("systemd-udev-trigger.service")["ExecMainExitTimestampMonotonic"],
        booted.show(BOOT)["ExecMainStartTimestampMonotonic"],
        booted.show(BOOT)["ExecMainExitTimestampMonotonic"],
        booted.show(DAEMON)["ExecMainStartTimestampMonotonic"],
    ]
    assert "0" not in moments
    assert moments == sorted(moments, key=int)
    settle = booted.show(BOOT)["ExecStartPre"]
    assert "udevadm settle" in settle
    assert "status=0" in settle


def test_it_takes_part_in_every_boot(booted):
    assert booted.run("systemctl", "is-enabled", BOOT, DAEMON).stdout.split() == ["enabled", "enabled"]
    assert booted.show(BOOT)["WantedBy"] == "multi-user.target"
    assert BOOT in booted.show(DAEMON)["After"].split()


def test_one_device_alone(booted, volumes):
    spoil(volumes["mended"])
    unit = instance(booted, volumes["mended"])
    booted.run("systemctl", "start", unit)
    assert f"{volumes['mended']}: " in booted.journal(unit)
    found = booted.run("luksrotctl", "--direct", "reconcile", "--dry-run", str(volumes["mended"])).stdout
    assert found == f"{volumes['mended']}: clean\n"
    failing = instance(booted, volumes["failing"])
    assert booted.run("systemctl", "start", failing, check=False).returncode == 1
    assert "Read-only file system" in booted.journal(failing)


def test_one_image(booted):
    """Whatever its name has that systemd escapes; the daemon is not configured for it."""
    booted.run("mkdir", "-p", "/srv/images")
    booted.run("truncate", "--size=20M", IMAGE)
    booted.put("/root/key", KEY.decode(), mode=0o600)
    booted.run("cryptsetup", "luksFormat", "-q", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", IMAGE, "/root/key")
    booted.run("dd", "if=/dev/zero", f"of={IMAGE}", "bs=4096", f"seek={SECOND_COPY // 4096}", "count=1", "conv=notrunc")
    unit = instance(booted, IMAGE)
    booted.run("systemctl", "start", unit)
    assert f"{IMAGE}: repaired: the secondary header copy is not valid" in booted.journal(unit)


def test_a_volume_that_waits_for_a_person_is_no_failure(booted, volumes):
    clean = str(volumes["clean"])
    booted.put("/root/token", '{"type": "luksrotd", "keyslots": ["0"], "name": "backup"}')
    booted.run("cryptsetup", "token", "import", "--json-file=/root/token", clean)
    assert booted.run("luksrotctl", "--direct", "reconcile", clean, check=False).returncode == 3
    unit = instance(booted, clean)
    booted.run("systemctl", "start", unit)
    assert f"{clean}: needs a person: " in booted.journal(unit)
