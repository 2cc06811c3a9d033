# SPDX-License-Identifier: GPL-2.0-or-later
"""Which block devices --direct looks at, of those that the kernel shows in /sys."""

import errno
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from luksrotd import direct
from luksrotd.errors import NotAuthorized, UnknownDevice
from luksrotd.host import udev
from tests.ctl.conftest import environment, loop_device
from tests.support.daemon_process import LIKE_THE_UNITS
from tests.support.makeimage import make_image


class Sys:
    """What the kernel would show."""

    def __init__(self, directory):
        self._devices = directory / "devices"
        self.block = directory / "block"
        self.block.mkdir()

    def add(self, name, *, on=(), partition_of="", dm="", size=8):
        """A device that stands on these others."""
        place = self._devices / partition_of / name
        (place / "holders").mkdir(parents=True)
        (place / "uevent").write_text(f"DEVNAME={name}\n")
        (place / "size").write_text(f"{size}\n")
        if partition_of:
            (place / "partition").write_text("1\n")
        if dm:
            (place / "dm").mkdir()
            (place / "dm" / "uuid").write_text(f"{dm}\n")
        (self.block / name).symlink_to(place)
        for below in on:
            (self.block / below / "holders" / name).symlink_to(place)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    shown = Sys(tmp_path)
    monkeypatch.setattr(direct, "BLOCK_DEVICES", shown.block)
    monkeypatch.setattr(direct, "_look", lambda _: True)
    return shown


def test_a_volume_that_is_open_is_looked_at(kernel):
    kernel.add("sda")
    kernel.add("sda1", partition_of="sda")
    kernel.add("dm-0", on=["sda1"], dm="CRYPT-LUKS2-8a0a1d4e-data")
    kernel.add("sr0", size=0)
    assert direct.scan() == ("/dev/sda", "/dev/dm-0", "/dev/sda1")


def test_the_paths_to_a_disk_are_left_to_the_device_on_top_of_them(kernel):
    for disk in ("sda", "sdb"):
        kernel.add(disk)
        kernel.add(f"{disk}1", partition_of=disk)
    kernel.add("dm-0", on=["sda", "sdb"], dm="mpath-3600a0b80")
    kernel.add("dm-1", on=["dm-0"], dm="part1-mpath-3600a0b80")
    assert direct.scan() == ("/dev/dm-1",)


def test_the_members_of_a_mirror_are_left_to_it(kernel):
    for member in ("sda1", "sdb1"):
        kernel.add(member)
    kernel.add("md0", on=["sda1", "sdb1"])
    kernel.add("dm-0", on=["md0"], dm="CRYPT-LUKS2-8a0a1d4e-data")
    assert direct.scan() == ("/dev/md0", "/dev/dm-0")


@pytest.fixture
def forbidden(kernel, monkeypatch):
    """Three disks; the second one belongs to somebody who keeps root out."""
    for disk in ("sda", "sdb", "sdc"):
        kernel.add(disk)
    monkeypatch.setattr(direct, "_look", lambda node: None if node == "/dev/sdb" else True)


@pytest.mark.usefixtures("forbidden")
def test_what_root_may_not_open_is_not_passed_over_without_a_word(monkeypatch):
    monkeypatch.setattr(udev, "may_hold_luks", lambda node: node == "/dev/sdb")
    assert direct.scan() == ("/dev/sda", "/dev/sdb", "/dev/sdc")
    monkeypatch.setattr(udev, "may_hold_luks", lambda _: False)
    assert direct.scan() == ("/dev/sda", "/dev/sdc")


@pytest.mark.usefixtures("forbidden")
def test_others_than_root_are_told_to_become_root(monkeypatch):
    monkeypatch.setattr(direct.os, "geteuid", lambda: 1000)
    with pytest.raises(NotAuthorized, match="cannot read 1 block devices: Permission denied; try as root"):
        direct.scan()


@pytest.mark.usefixtures("forbidden")
def test_a_uuid_is_found_beside_devices_that_cannot_be_read(monkeypatch, tmp_path):
    def uuid_of(ref):
        if ref.path == "/dev/sdb":
            raise direct.DeviceError("cannot open /dev/sdb: Permission denied")
        return ref.path[-3:]

    monkeypatch.setattr(direct, "BY_UUID", tmp_path)
    monkeypatch.setattr(direct, "uuid_of", uuid_of)
    monkeypatch.setattr(udev, "may_hold_luks", lambda _: True)
    assert direct.node_of("SDC") == "/dev/sdc"
    reason = "LUKS UUID other; cannot open /dev/sdb: Permission denied"
    with pytest.raises(UnknownDevice, match=reason):
        direct.node_of("other")


@pytest.mark.parametrize(("number", "seen"), [(errno.EACCES, None), (errno.EPERM, False)])
def test_what_a_control_group_keeps_from_a_container_is_none_of_its_business(monkeypatch, number, seen):
    def refuse(_):
        raise PermissionError(number, os.strerror(number))

    monkeypatch.setattr(direct, "_holds_luks2", refuse)
    assert direct._look("/dev/sdb") is seen


@contextmanager
def belonging_to_nobody(node):
    before = Path(node).stat()
    os.chown(node, 65534, 65534)
    Path(node).chmod(0o600)
    try:
        yield
    finally:
        os.chown(node, before.st_uid, before.st_gid)
        Path(node).chmod(before.st_mode)


#: luksrotctl on a machine that has only the block devices that are named first; others' come and go.
ONLY = """
import sys
from luksrotd import direct
from luksrotd.ctl.__main__ import main
direct._nodes = sys.argv.pop(1).split
sys.exit(main())
"""


def test_a_node_of_somebody_elses_fails_by_itself_and_the_others_are_reconciled(tmp_path):
    """By the real command, with the rights that the units have."""
    images = [make_image(tmp_path / f"{name}.img") for name in ("others", "own")]
    with loop_device(images[0]) as others, loop_device(images[1]) as own:

        def reconcile(*options, prefix=()):
            command = [*prefix, sys.executable, "-P", "-c", ONLY, f"{others} {own}", "--direct", "reconcile", "--all"]
            return subprocess.run([*command, *options], env=environment(), capture_output=True, check=False, text=True)

        with belonging_to_nobody(others):
            told, text = reconcile("--json", prefix=LIKE_THE_UNITS), reconcile(prefix=LIKE_THE_UNITS)
            unhindered = reconcile()
    message = (
        f"cannot open {others}: Permission denied (it belongs to user 65534, group 65534, mode 0600): "
        "let root open it (luksrotd(8), PROBLEMS)"
    )
    failed, clean = json.loads(told.stdout)["volumes"]
    assert failed == {"device": others, "error": "NotAuthorized", "message": message, "outcome": "unchanged"}
    assert (clean["device"], clean["found"]) == (own, [])
    assert text.stdout.splitlines() == [f"{others}: {message}", f"{own}: clean"]
    assert told.returncode == text.returncode == 5
    assert (unhindered.returncode, unhindered.stdout.splitlines()) == (0, [f"{others}: clean", f"{own}: clean"])
