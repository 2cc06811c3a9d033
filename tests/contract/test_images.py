# SPDX-License-Identifier: GPL-2.0-or-later
"""Configured volumes: what only image files and detached headers can do.  The rest is in test_watcher.py."""

import asyncio
import os
import shutil
import threading
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from luksrotd.config import ManagedVolume
from luksrotd.direct import uuid_of
from luksrotd.errors import DeviceError
from luksrotd.host import images
from luksrotd.host.images import ImageWatcher
from luksrotd.ports import DeviceEvent, DeviceRef, WatchEvent
from tests.contract.conftest import loop_device, run

ADDED, CHANGED, REMOVED = WatchEvent.ADDED, WatchEvent.CHANGED, WatchEvent.REMOVED
HANG = 60

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("no_leaked_descriptors")]


class Reader:
    """The events of a watcher; all that it reads has its time."""

    def __init__(self, watcher, events):
        self.watcher = watcher
        self._events = events

    async def next(self, *, poke=True):
        if poke:
            self.watcher.poke()
        async with asyncio.timeout(HANG):
            return await anext(self._events)


@asynccontextmanager
async def following(*volumes, uuid_of=uuid_of, **options):
    watcher = ImageWatcher(uuid_of, **{"poll_seconds": HANG, **options})
    watcher.configure(volumes)
    await watcher.ready()
    async with aclosing(watcher.events()) as events:
        yield Reader(watcher, events)
    watcher.close()


def uuid(image):
    return run("cryptsetup", "luksUUID", str(image))


def event(kind, node, header=None, uuid=""):
    return DeviceEvent(kind, str(node), uuid, header and str(header), configured=True)


async def test_what_is_configured_later_comes_and_goes(luks2_image, tmp_path):
    volume = ManagedVolume(str(luks2_image))
    other = ManagedVolume(str(tmp_path / "nothing"))
    async with following(other) as reader:
        reader.watcher.configure([other, volume])
        assert await reader.next() == event(ADDED, luks2_image, uuid=uuid(luks2_image))
        reader.watcher.configure([other])
        assert await reader.next() == event(REMOVED, luks2_image)


async def test_it_is_polled_only_while_there_is_something_to_poll(luks2_image, monkeypatch):
    looked = asyncio.Event()
    look = images.look
    loop = asyncio.get_running_loop()

    def seen(volume, before, uuid_of):
        loop.call_soon_threadsafe(looked.set)
        return look(volume, before, uuid_of)

    monkeypatch.setattr(images, "look", seen)
    async with following(ManagedVolume(str(luks2_image)), poll_seconds=0.01) as reader:
        first = await reader.next(poke=False)
        for _ in range(3):
            luks2_image.touch()
            assert await reader.next(poke=False) == event(CHANGED, luks2_image, uuid=first.uuid)
        waiting = asyncio.create_task(reader.next(poke=False))  # this is what polls
        reader.watcher.configure([])
        assert await waiting == event(REMOVED, luks2_image)
        assert reader.watcher._looks == {}
        looked.clear()
        await reader.watcher._look()
        assert not looked.is_set()


async def test_a_detached_header(luks2_image, tmp_path):
    data = tmp_path / "data"
    volume = ManagedVolume(str(data), str(luks2_image))
    async with following(volume) as reader:
        data.write_bytes(b"")
        there = event(ADDED, data, luks2_image, uuid(luks2_image))
        assert await reader.next() == there
        luks2_image.touch()
        assert (await reader.next()).kind is CHANGED
        data.unlink()
        assert await reader.next() == event(REMOVED, data, luks2_image)
        data.write_bytes(b"")
        assert await reader.next() == there


@pytest.mark.parametrize("copied", [shutil.copy, os.link])
async def test_a_link_is_followed_and_may_lead_elsewhere(luks2_image, tmp_path, copied):
    copy = tmp_path / "copy.img"
    copied(luks2_image, copy)
    link = tmp_path / "link"
    link.symlink_to(luks2_image)
    same = uuid(luks2_image)
    async with following(ManagedVolume(str(link))) as reader:
        assert await reader.next() == event(ADDED, luks2_image, uuid=same)
        link.unlink()
        link.symlink_to(copy)
        assert await reader.next() == event(REMOVED, luks2_image)
        assert await reader.next() == event(ADDED, copy, uuid=same)


@pytest.mark.parametrize("path", ["/dev/null", "/", "/nonexistent/x", "/dev/null/x", "\0", "x" * 300])
async def test_what_cannot_be_a_volume_is_told_of_once_in_the_log(path, luks2_image, caplog):
    async with following(ManagedVolume(path), ManagedVolume(str(luks2_image))) as reader:
        assert (await reader.next()).node == str(luks2_image)
        for _ in range(3):
            luks2_image.touch()
            assert (await reader.next()).kind is CHANGED
    assert len(caplog.records) == 1


async def test_a_real_path_that_no_message_could_name(luks2_image, tmp_path, caplog):
    real = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bytes-\xff"))
    shutil.copy(luks2_image, real)
    link = tmp_path / "link"
    link.symlink_to(real)
    async with following(ManagedVolume(str(link)), ManagedVolume(str(luks2_image))) as reader:
        assert (await reader.next()).node == str(luks2_image)
    assert "not printable" in caplog.text


async def test_a_file_that_changes_and_never_holds_a_volume_is_told_of_once(tmp_path, luks2_image, caplog):
    other = tmp_path / "other"
    async with following(ManagedVolume(str(other)), ManagedVolume(str(luks2_image))) as reader:
        await reader.next()
        for size in range(1, 4):
            other.write_bytes(bytes(size))
            luks2_image.touch()
            assert (await reader.next()).kind is CHANGED
    assert [record.message.rpartition(": ")[2] for record in caplog.records] == [
        "No such file or directory",
        "it holds no LUKS2 volume",
    ]


async def test_what_is_not_configured_any_more_when_it_has_been_looked_at(luks2_image, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "LOOK_SECONDS", 0.01)
    alive = threading.Event()
    other = tmp_path / "other.img"
    shutil.copy(luks2_image, other)

    def read(ref: DeviceRef):
        assert alive.wait(HANG)
        return uuid_of(ref)

    async with following(ManagedVolume(str(luks2_image)), uuid_of=read) as reader:
        reader.watcher.configure([ManagedVolume(str(other))])
        alive.set()
        assert (await reader.next()).node == str(other)


async def test_a_block_device_is_for_udev_unless_its_header_is_detached(luks2_image, tmp_path, caplog):
    other = tmp_path / "other.img"
    other.write_bytes(luks2_image.read_bytes())
    with loop_device(luks2_image) as node:
        async with following(ManagedVolume(node), ManagedVolume(node, str(other))) as reader:
            assert await reader.next() == event(ADDED, node, other, uuid(other))
    assert "which udev shows" in caplog.text


async def test_a_header_that_cannot_be_read_keeps_what_was_there(luks2_image, caplog):
    broken = False

    def read(ref: DeviceRef):
        if broken:
            raise DeviceError("cannot read it: simulated")
        return uuid_of(ref)

    async with following(ManagedVolume(str(luks2_image)), uuid_of=read) as reader:
        first = await reader.next()
        broken = True
        luks2_image.touch()
        assert await reader.next() == event(CHANGED, luks2_image, uuid=first.uuid)
        broken = False
        assert await reader.next() == event(CHANGED, luks2_image, uuid=first.uuid)  # though the file is the same
        os.truncate(luks2_image, 0)
        assert await reader.next() == event(REMOVED, luks2_image)
    assert [record.message.rpartition(": ")[2] for record in caplog.records] == [
        "simulated",
        "it holds no LUKS2 volume",
    ]


async def test_a_dead_file_system_does_not_hold_up_the_rest(luks2_image, monkeypatch):
    """Whoever starts waits for a while, and no longer."""
    monkeypatch.setattr(images, "LOOK_SECONDS", 0.01)
    alive = threading.Event()

    def read(ref: DeviceRef):
        assert alive.wait(HANG)
        return uuid_of(ref)

    async with following(ManagedVolume(str(luks2_image)), uuid_of=read) as reader:
        alive.set()
        assert (await reader.next(poke=False)).kind is ADDED


async def test_an_error_that_nobody_foresaw_does_not_end_the_looking(luks2_image, caplog):
    broken = True

    def read(ref: DeviceRef):
        if broken:
            raise RuntimeError("simulated")
        return uuid_of(ref)

    async with following(ManagedVolume(str(luks2_image)), uuid_of=read) as reader:
        broken = False
        os.utime(luks2_image)
        assert await reader.next() == event(ADDED, luks2_image, uuid=uuid(luks2_image))
    assert caplog.messages[-1].endswith("internal error")
