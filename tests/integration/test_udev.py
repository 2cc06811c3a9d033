# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes as they come, change and go: real udevd, real loop devices and partitions, real cryptsetup."""

import asyncio
import os
import signal
import subprocess
import time
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from luksrotd import direct, names
from luksrotd.config import ManagedVolume
from luksrotd.host.images import ImageWatcher
from luksrotd.host.udev import UdevWatcher
from luksrotd.ports import DeviceRef
from luksrotd.service.registry import Registry
from luksrotd.service.volume import Volumes
from tests.support import forge, makeimage
from tests.support.daemon_launcher import OwnLoops
from tests.support.daemon_process import (
    BACKUP,
    OLD,
    PREFIX,
    appeared,
    disk,
    ended,
    running,
    settled,
    start,
)
from tests.support.kernel import LoopDevice

pytestmark = pytest.mark.asyncio
DEVICE = names.DEVICE_INTERFACE
HANG = 60


def run(*command, data=None):
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout.decode().strip()


def foreign(client, path):
    """The changes by somebody else that were signalled of a volume."""
    return [
        tuple(message.body) for message in client.signals if (message.member, message.path) == ("ForeignChange", path)
    ]


async def told(client, path, after):
    """The next of them, up to this generation: from where, and its kind.  A tool may write more than once."""
    before = None
    async with asyncio.timeout(HANG):
        while True:
            message = await client.signal("ForeignChange")
            if message.path != path:
                continue
            before = message.body[0] if before is None else before
            if message.body[1] == after:
                return before, message.body[2]


def rewrite(node, change, offset=0):
    """Change both header copies behind everybody's back."""
    with Path(node).open("r+b") as file:
        file.seek(offset)
        headers = file.read(32768)
        file.seek(offset)
        file.write(change(headers))


def copies_agree(node):
    with Path(node).open("rb") as file:
        return forge.pair_of(file.read(20 * 1024 * 1024)).agree


# -- the daemon ---------------------------------------------------------------------------------------------------


async def test_what_a_device_is(daemon, client, volume):
    seen = await client.get_all(volume.path, DEVICE)
    assert f"/dev/disk/by-uuid/{volume.uuid}" in seen["Links"]
    assert (seen["Node"], seen["Header"], seen["System"]) == (volume.node, "", True)
    assert len(seen["HeaderDigest"]) == 64


async def test_somebody_elses_changes_are_signalled_and_ours_are_not(bed, enrolled, client):
    path, node = enrolled.path, enrolled.node
    assert (await ended(client, await start(client, path)))["State"] == "finished"
    await asyncio.to_thread(run, "udevadm", "settle")  # so that what our own writes have caused is there too
    before = (await settled(client, path))["Generation"]
    backup = bed.dir / "header.backup"
    await asyncio.to_thread(run, "cryptsetup", "luksHeaderBackup", "--header-backup-file", str(backup), node)
    await asyncio.to_thread(makeimage.add_key, node, OLD, b"somebody's")
    first = await settled(client, path, Keyslots=[0, 1, 2])
    now = first["Generation"]
    assert await told(client, path, now) == (before, "newer")

    await asyncio.to_thread(run, "cryptsetup", "luksHeaderRestore", "-q", "--header-backup-file", str(backup), node)
    older = await settled(client, path, Generation=before)
    assert await told(client, path, before) == (now, "older")

    await asyncio.to_thread(rewrite, node, lambda headers: forge.with_fields(headers, label=b"another"))
    same = await settled(client, path, Label="another")
    assert await told(client, path, before) == (before, "same")
    assert len({seen["HeaderDigest"] for seen in (first, older, same)}) == 3

    # To the daemon, luksrotctl --direct is somebody else too.
    done = await direct.volumes().set_data(DeviceRef(node), {"by": "another process"})
    assert await told(client, path, done.seqid_after) == (before, "newer")

    assert (await ended(client, await start(client, path, new=BACKUP)))["State"] == "finished"
    await asyncio.to_thread(run, "udevadm", "settle")
    await settled(client, path)
    assert foreign(client, path) == []


@contextmanager
def partition(bed):
    """A volume in a partition, which comes and goes by ``partx``."""
    image = bed.dir / f"{PREFIX}parts.img"
    volume = makeimage.make_image(bed.dir / "part.img", key=OLD)
    with image.open("wb") as file:
        file.truncate(1024 * 1024 * 20)
        file.seek(1024 * 1024)
        file.write(volume.read_bytes())
    with LoopDevice(image) as loop:
        run(
            "sfdisk",
            "--quiet",
            "--force",
            "--no-reread",
            "--no-tell-kernel",
            str(loop.path),
            data=b"label: gpt\nstart=2048\n",
        )
        try:
            yield str(loop.path), forge.view_of(volume.read_bytes()).uuid
        finally:
            delete_partition(loop.path)
    image.unlink()


def delete_partition(node):
    """A udevd that has it open lets go of it soon."""
    deadline = time.monotonic() + HANG
    while Path(f"{node}p1").exists() or list(Path(f"/sys/block/{Path(node).name}").glob("*p1")):
        subprocess.run(["partx", "--delete", str(node)], check=False, capture_output=True)
        assert time.monotonic() < deadline


async def gone(client, path):
    async with asyncio.timeout(HANG):
        while (await client.signal("InterfacesRemoved")).body[0] != path:
            pass


async def test_a_volume_that_comes_again_is_reconciled(bed, daemon, client):
    """A partition really comes and goes; meanwhile a crash elsewhere has torn a header copy."""
    with partition(bed) as (node, uuid):
        path = f"{names.DEVICE_PATH}/{uuid.replace('-', '_')}"
        await asyncio.to_thread(run, "partx", "--add", node)
        seen = await appeared(client, path)
        assert seen["Node"] == f"{node}p1"
        assert (await ended(client, await start(client, path, "Enroll", new=BACKUP)))["State"] == "finished"
        before = await settled(client, path)
        await asyncio.to_thread(delete_partition, node)
        await gone(client, path)
        torn = lambda headers: forge.torn(headers, bytes(len(headers)), forge.Which.PRIMARY)  # noqa: E731 -- for rewrite alone
        await asyncio.to_thread(rewrite, node, torn, 1024 * 1024)
        await asyncio.to_thread(run, "partx", "--add", node)
        await appeared(client, path)
        after = await settled(client, path, Problems=[])
        assert makeimage.cryptsetup_opens(f"{node}p1", BACKUP)
        assert await asyncio.to_thread(copies_agree, f"{node}p1")
        assert after["Keyslots"] == before["Keyslots"]
        assert await told(client, path, before["Generation"]) == (before["Generation"], "same")


def broken_json(image):
    image.write_bytes(forge.with_text(image.read_bytes(), b"[" * 5000))


def deep_and_large(image):
    """4 MiB of JSON, with a right checksum."""
    uuid = forge.view_of(image.read_bytes()).uuid
    makeimage.make_image(image, key=OLD, metadata_size=4 * 1024 * 1024, size=32 * 1024 * 1024)
    makeimage.set_uuid(image, uuid)
    text = b'{"keyslots":' * (4 * 1024 * 1024 // 12 - 1000)
    image.write_bytes(forge.with_text(image.read_bytes(), text))


def garbage(image):
    with image.open("r+b") as file:
        start = file.read(4096)
        file.seek(0)
        file.write(start[:512] + b"\xff" * 65536)


@pytest.mark.parametrize("spoil", [broken_json, deep_and_large, garbage])
async def test_a_hostile_header_that_is_plugged_in_is_shown_with_the_reason(bed, daemon, client, volume, spoil):
    with disk(bed, "hostile", prepare=spoil) as hostile:
        seen = await appeared(client, hostile.path)
        assert [problem[1] for problem in seen["Problems"]] == ["person"]
        assert (seen["Generation"], seen["HeaderDigest"], seen["Keyslots"]) == (0, "", [])
        job = await ended(client, await start(client, hostile.path, "Enroll"))
        assert job["State"] == "failed"
    assert (await ended(client, await start(client, volume.path, "Enroll")))["State"] == "finished"


async def test_a_uuid_of_another_form_is_left_alone(bed, daemon, client, volume):
    with disk(bed, "odd", prepare=lambda image: makeimage.set_uuid(image, "../../org/luksrotd1")):
        async with asyncio.timeout(HANG):
            while "its LUKS UUID is malformed" not in daemon.log:
                await client.get_all(volume.path, DEVICE)
    assert (await client.call(names.ROOT_PATH, names.MANAGER_INTERFACE, "GetDevices", "a{sv}", [{}])) == [[volume.path]]


async def test_what_the_configuration_names(bed, tmp_path, client):
    """An image and a detached header: all verbs write there and nowhere else, and a reload takes them away again."""
    image = makeimage.make_image(bed.dir / f"{PREFIX}named.img", key=OLD)
    header = makeimage.make_image(bed.dir / f"{PREFIX}named.header", key=OLD, detached=True)
    data = f"{header}.data"
    untouched = await asyncio.to_thread(Path(data).read_bytes)
    config = tmp_path / "luksrotd.conf"
    sections = (f"[Volume]\nPath={image}\n", f"[Volume]\nPath={data}\nHeader={header}\n")
    config.write_text("[Devices]\nDeny=uuid:*\n" + "".join(sections))
    paths = {}
    for holder in (image, header):
        uuid = forge.view_of(holder.read_bytes()).uuid
        paths[holder] = f"{names.DEVICE_PATH}/{uuid.replace('-', '_')}"
    async with running(bed, client, config=str(tmp_path)) as daemon:
        devices = await client.call(names.ROOT_PATH, names.MANAGER_INTERFACE, "GetDevices", "a{sv}", [{}])
        assert sorted(devices[0]) == sorted(paths.values())  # at once: they are a part of the scan
        seen = await client.get_all(paths[header], DEVICE)
        assert (seen["Node"], seen["Header"], seen["System"]) == (data, str(header), True)
        found = await client.call(names.ROOT_PATH, names.MANAGER_INTERFACE, "GetDevice", "sa{sv}", [data, {}])
        assert found == [paths[header]]
        for holder, path in paths.items():
            assert (await ended(client, await start(client, path, "Enroll", new=BACKUP)))["State"] == "finished"
            assert (await ended(client, await start(client, path, new=b"next")))["State"] == "finished"
            assert makeimage.cryptsetup_opens(str(holder), b"next")
        assert await asyncio.to_thread(Path(data).read_bytes) == untouched

        os.kill(daemon.pid, signal.SIGHUP)  # it looks at the files again, and finds nothing but its own changes
        before = (await settled(client, paths[image]))["Generation"]
        await asyncio.to_thread(makeimage.add_key, image, OLD, b"somebody's")
        os.kill(daemon.pid, signal.SIGHUP)
        after = (await settled(client, paths[image], Keyslots=[0, 1, 2]))["Generation"]
        assert await told(client, paths[image], after) == (before, "newer")
        assert foreign(client, paths[header]) == []

        config.write_text("[Devices]\nDeny=uuid:*\n" + sections[0])
        os.kill(daemon.pid, signal.SIGHUP)
        await gone(client, paths[header])
        await asyncio.to_thread(image.unlink)
        os.kill(daemon.pid, signal.SIGHUP)
        await gone(client, paths[image])


# -- the registry on the real ports ---------------------------------------------------------------------------------


class Noted:
    """Real use cases that count examinations."""

    def __init__(self):
        self.volumes = Volumes(direct.build_host())
        self.examined = []
        self.before = None
        examine = self.volumes.examine

        async def noted(ref, **options):
            self.examined.append(ref.path)
            if self.before:
                self.before(ref)
            return await examine(ref, **options)

        self.volumes.examine = noted


@asynccontextmanager
async def following(volumes, *watchers, **options):
    """A registry, which has scanned."""
    registry = Registry(volumes, *watchers, **options)
    task = asyncio.create_task(registry.run())
    async with asyncio.timeout(HANG):
        await registry.scanned()
    yield registry
    for watcher in watchers:
        watcher.close()
    await task


class Changes:
    """An observer to wait on."""

    def __init__(self, registry):
        self._changed = asyncio.Event()
        registry.observe(self)

    def volume_added(self, volume):
        self._changed.set()

    def volume_changed(self, volume, *, fresh):
        self._changed.set()

    def volume_removed(self, volume):
        self._changed.set()

    async def until(self, condition):
        async with asyncio.timeout(HANG):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


async def test_a_storm_of_change_events_is_examined_once(bed, volume):
    noted = Noted()
    watcher = OwnLoops(UdevWatcher(), PREFIX)
    async with following(noted.volumes, watcher, pause_seconds=3600) as registry:
        uevent = Path("/sys/class/block", Path(volume.node).name, "uevent")
        await asyncio.to_thread(lambda: [uevent.write_text("change") for _ in range(1000)])
        with disk(bed, "last") as last:  # what comes after the storm has come when this is there
            changes = Changes(registry)
            await changes.until(lambda: last.uuid in registry.volumes)
            assert noted.examined.count(volume.node) == 1
            await registry.settle(volume.uuid)
            assert noted.examined.count(volume.node) == 2


async def test_devices_that_appear_during_the_scan_are_neither_lost_nor_twice(bed, volume):
    """Two of them: between the start of the monitor and the enumeration, and right after that."""
    disks = []

    class Slow(UdevWatcher):
        def _scan(self, context):
            for _ in range(2):
                disks.append(stack.enter_context(disk(bed, f"scan{len(disks)}")))
                run("udevadm", "settle")
                if len(disks) == 1:
                    super()._scan(context)

    with ExitStack() as stack:
        async with following(Noted().volumes, OwnLoops(Slow(), PREFIX)) as registry:
            changes = Changes(registry)
            expected = {volume.uuid, *(late.uuid for late in disks)}
            assert len(expected) == 3
            await changes.until(lambda: expected <= registry.volumes.keys())
            for late in disks:
                assert registry.get(late.uuid).nodes == (late.node,)


async def test_a_device_that_vanishes_as_it_is_examined_ends_nothing(bed, volume):
    noted = Noted()
    with disk(bed, "gone") as gone:
        noted.before = lambda ref: gone.detach() if ref.path == gone.node else None
        async with following(noted.volumes, OwnLoops(UdevWatcher(), PREFIX)) as registry:
            changes = Changes(registry)
            await changes.until(lambda: gone.uuid not in registry.volumes)
            assert gone.node in noted.examined
            assert list(registry.volumes) == [volume.uuid]
            assert registry.get(volume.uuid).view is not None


async def test_an_image_that_is_configured_and_a_loop_device_on_it(bed):
    """They show one UUID, so nothing is written, until one of them is gone."""
    image = makeimage.make_image(bed.dir / f"{PREFIX}configured.img", key=OLD)
    uuid = forge.view_of(image.read_bytes()).uuid
    images = ImageWatcher(direct.uuid_of)
    images.configure([ManagedVolume(str(image))])
    await images.ready()
    async with following(Noted().volumes, OwnLoops(UdevWatcher(), PREFIX), images) as registry:
        changes = Changes(registry)
        assert registry.writable(uuid).ref.path == str(image)
        assert registry.get(uuid).system
        with LoopDevice(image) as loop:
            await changes.until(lambda: registry.get(uuid).nodes == (str(image), str(loop.path)))
            await changes.until(lambda: registry.get(uuid).problems)
            assert registry.get(uuid).problems[0].code == "uuid-ambiguous"
        await changes.until(lambda: registry.get(uuid).nodes == (str(image),) and not registry.get(uuid).problems)
        await asyncio.to_thread(image.unlink)
        images.poke()
        await changes.until(lambda: uuid not in registry.volumes)
