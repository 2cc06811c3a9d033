# SPDX-License-Identifier: GPL-2.0-or-later
"""Which block devices --direct looks at, of those that the kernel shows in /sys."""

import pytest

from luksrotd import direct


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
