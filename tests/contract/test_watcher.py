# SPDX-License-Identifier: GPL-2.0-or-later
"""``ports.Watcher``, simulated and with a real systemd-udevd."""

import asyncio
import os
import socket
from contextlib import ExitStack, aclosing, asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from luksrotd.config import ManagedVolume
from luksrotd.direct import uuid_of
from luksrotd.host.images import ImageWatcher
from luksrotd.host.udev import Found, UdevWatcher, is_removable, look, may_hold_luks, transition
from luksrotd.ports import DeviceEvent, Traits, WatchEvent
from tests.contract.conftest import delete_partitions, format_luks2, loop_device, other_network, run
from tests.support.simhost import SimWatcher

ADDED, CHANGED, REMOVED = WatchEvent.ADDED, WatchEvent.CHANGED, WatchEvent.REMOVED
KOBJECT_UEVENT, UDEV_GROUP = 15, 2  # linux/netlink.h, and libudev
HANG = 60  # seconds, after which a lost event is a failure and not a hang

pytestmark = pytest.mark.usefixtures("no_leaked_descriptors")


class SimBench:
    """Nodes of a simulated watcher."""

    def __init__(self):
        self._watcher = SimWatcher()
        self._volumes = 0

    def watcher(self):
        return self._watcher

    def attach(self):
        self._volumes += 1
        return f"/dev/sim{self._volumes}"

    def format(self, node):
        self._volumes += 1
        uuid = f"uuid-{self._volumes}"
        self._watcher.put(node, uuid)
        return uuid

    def touch(self, node):
        self._watcher.put(node, self._watcher.present[node])

    def carry(self, node):
        self._watcher.put(node, self._watcher.present[node], Traits(("/dev/disk/by-id/usb-x",), "usb", removable=True))

    def wipe(self, node):
        self._watcher.remove(node)

    detach = wipe

    def settle(self):
        pass


class RealBench:
    """Loop devices under udevd."""

    def __init__(self, directory, rules):
        self._directory = directory
        self._rules = rules
        self._images = 0
        self._attached = ExitStack()

    def watcher(self, **options):
        return UdevWatcher(**options)

    def attach(self):
        self._images += 1
        image = self._directory / f"image{self._images}"
        with image.open("wb") as file:
            file.truncate(20 * 1024 * 1024)
        node = self._attached.enter_context(loop_device(image))
        self.settle()
        return node

    def format(self, node):
        format_luks2(node)
        self.settle()
        return run("cryptsetup", "luksUUID", node)

    def touch(self, node):
        run("udevadm", "trigger", "--settle", "--action=change", node)

    def rule(self, node, properties):
        """Have udev say something of a node, from its next event on."""
        self._rules.mkdir(exist_ok=True)
        said = ", ".join(properties)
        (self._rules / "99-contract.rules").write_text(f'KERNEL=="{node.removeprefix("/dev/")}", {said}\n')
        run("udevadm", "control", "--reload")

    def carry(self, node):
        self.rule(node, ['ENV{ID_BUS}="usb"', 'ENV{UDISKS_SYSTEM}="0"', 'SYMLINK+="disk/by-id/usb-x other/name"'])
        self.touch(node)

    def wipe(self, node):
        run("wipefs", "--all", "--quiet", node)
        self.settle()

    def detach(self, node):
        run("losetup", "--detach", node)
        self.settle()

    def settle(self):
        run("udevadm", "settle")

    def close(self):
        self._attached.close()
        self.settle()


class Configured(ImageWatcher):
    """Follows the images of a bench from its beginning on, and looks only when it is told to."""

    def __init__(self, volumes):
        super().__init__(uuid_of, poll_seconds=HANG)
        self._named = volumes

    async def events(self):
        self.configure(self._named)
        await self.ready()
        async with aclosing(super().events()) as events:
            async for event in events:
                yield event


class ImageBench:
    """Image files that the configuration names."""

    def __init__(self, directory):
        self._directory = directory
        self._named = []
        self._watcher = None

    def watcher(self):
        self._watcher = Configured(self._named)
        return self._watcher

    def attach(self):
        self._named.append(ManagedVolume(str(self._directory / f"image{len(self._named)}")))
        return self._named[-1].path

    def format(self, node):
        with Path(node).open("wb") as file:
            file.truncate(20 * 1024 * 1024)
        format_luks2(node)
        self._poke()
        return run("cryptsetup", "luksUUID", node)

    def touch(self, node):
        os.utime(node)
        self._poke()

    def wipe(self, node):
        run("wipefs", "--all", "--quiet", node)
        self._poke()

    def detach(self, node):
        Path(node).unlink()
        self._poke()

    def _poke(self):
        if self._watcher:
            self._watcher.poke()


@pytest.fixture
def real(udevd, private_run, tmp_path):
    assert udevd.poll() is None
    bench = RealBench(tmp_path, private_run / "udev" / "rules.d")
    yield bench
    bench.close()


@pytest.fixture(params=["sim", "udevd", "images"])
def bench(request, tmp_path):
    if request.param == "udevd":
        return request.getfixturevalue("real")
    return SimBench() if request.param == "sim" else ImageBench(tmp_path)


@pytest.fixture(params=["sim", "udevd"])
def devices(request):
    """Those that can say what their devices are."""
    return SimBench() if request.param == "sim" else request.getfixturevalue("real")


class Reader:
    """Reads the events of some nodes; others on the machine have devices too.  ``traits``: those of the last one."""

    def __init__(self, events, nodes):
        self._events = events
        self._nodes = nodes
        self.traits = Traits()

    async def next(self):
        async with asyncio.timeout(HANG):
            async for event in self._events:
                if event.node in self._nodes:
                    self.traits = event.traits
                    return replace(event, traits=Traits(), configured=False)
        return None

    async def until(self, kind):
        """The next event of another kind than CHANGED: udev may say more than once that something changed."""
        while (event := await self.next()).kind is not kind:
            assert event.kind is CHANGED
        return event


@asynccontextmanager
async def reading(watcher, *nodes):
    async with aclosing(watcher.events()) as events:
        yield Reader(events, nodes)
    watcher.close()


@pytest.mark.asyncio
async def test_what_is_there_comes_first(bench):
    one, two, empty = bench.attach(), bench.attach(), bench.attach()
    uuids = {one: bench.format(one), two: bench.format(two)}
    async with reading(bench.watcher(), one, two, empty) as reader:
        seen = {(event := await reader.until(ADDED)).node: event.uuid for _ in uuids}
        assert seen == uuids


@pytest.mark.asyncio
async def test_a_volume_comes_changes_and_goes(bench):
    node = bench.attach()
    other = bench.attach()
    bench.format(other)
    async with reading(bench.watcher(), node, other) as reader:
        assert (await reader.until(ADDED)).node == other
        uuid = bench.format(node)
        assert await reader.until(ADDED) == DeviceEvent(ADDED, node, uuid)
        bench.touch(node)
        assert await reader.next() == DeviceEvent(CHANGED, node, uuid)
        bench.wipe(node)
        assert await reader.until(REMOVED) == DeviceEvent(REMOVED, node)
        again = bench.format(node)
        assert await reader.until(ADDED) == DeviceEvent(ADDED, node, again)
        bench.detach(node)
        assert await reader.until(REMOVED) == DeviceEvent(REMOVED, node)


@pytest.mark.asyncio
async def test_another_volume_on_the_node_is_gone_and_come(bench):
    node = bench.attach()
    first = bench.format(node)
    async with reading(bench.watcher(), node) as reader:
        assert await reader.until(ADDED) == DeviceEvent(ADDED, node, first)
        second = bench.format(node)
        assert await reader.until(REMOVED) == DeviceEvent(REMOVED, node)
        assert await reader.until(ADDED) == DeviceEvent(ADDED, node, second)


@pytest.mark.asyncio
async def test_what_a_device_is_comes_with_its_events(devices):
    bench = devices
    node = bench.attach()
    uuid = bench.format(node)
    async with reading(bench.watcher(), node) as reader:
        await reader.until(ADDED)
        assert (reader.traits.bus, reader.traits.removable) == ("", False)
        bench.carry(node)
        while not reader.traits.removable:
            assert await reader.next() == DeviceEvent(CHANGED, node, uuid)
        assert reader.traits.bus == "usb"
        assert "/dev/disk/by-id/usb-x" in reader.traits.links
        assert all(link.startswith("/dev/disk/") for link in reader.traits.links)
        bench.detach(node)
        assert await reader.until(REMOVED) == DeviceEvent(REMOVED, node)
        assert reader.traits == Traits()


@pytest.mark.asyncio
async def test_closing_ends_the_events(bench):
    node = bench.attach()
    bench.format(node)
    watcher = bench.watcher()
    async with reading(watcher, node) as reader:
        await reader.until(ADDED)
        waiting = asyncio.create_task(reader.next())
        for _ in range(5):
            await asyncio.sleep(0)
        watcher.close()
        watcher.close()
        assert await waiting is None


# -- only the real one -------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_events_that_queued_up_are_one(real):
    node = real.attach()
    uuid = real.format(node)
    last = real.attach()
    async with reading(real.watcher(), node, last) as reader:
        await reader.until(ADDED)
        for _ in range(10):  # the loop does not run meanwhile, so all of them wait in the socket
            real.touch(node)
        added = real.format(last)
        seen = [await reader.next()]
        while seen[-1].node != last:
            seen.append(await reader.next())
        assert seen == [DeviceEvent(CHANGED, node, uuid), DeviceEvent(ADDED, last, added)]


@pytest.mark.asyncio
async def test_when_events_were_lost_everything_is_looked_at_again(real):
    """The receive buffer holds an event or two: most of those below are dropped, and are told of all the same."""
    stays, goes, comes = real.attach(), real.attach(), real.attach()
    staying, _ = real.format(stays), real.format(goes)
    async with reading(real.watcher(receive_buffer=1), stays, goes, comes) as reader:
        assert {(await reader.until(ADDED)).node for _ in range(2)} == {stays, goes}
        for _ in range(10):
            real.touch(stays)
        real.wipe(goes)
        coming = real.format(comes)
        seen = set()
        while len(seen) < 3:
            seen.add(await reader.next())
        assert seen == {
            DeviceEvent(CHANGED, stays, staying),
            DeviceEvent(REMOVED, goes),
            DeviceEvent(ADDED, comes, coming),
        }


def socket_unit():
    """What luksrotd-udev.socket opens; its owner is whoever uses it."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, KOBJECT_UEVENT) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        opened.bind((0, UDEV_GROUP))
        return opened.detach()


@pytest.mark.asyncio
@pytest.mark.parametrize("network", [nullcontext, other_network], ids=["same-network", "other-network"])
async def test_events_come_by_the_socket_that_was_given(real, network):
    """In another network namespace no socket of its own would get any."""
    node, other = real.attach(), real.attach()
    real.format(other)
    watcher = real.watcher(inherited=socket_unit())
    with network():
        async with reading(watcher, node, other) as reader:
            assert (await reader.until(ADDED)).node == other
            uuid = real.format(node)
            assert await reader.until(ADDED) == DeviceEvent(ADDED, node, uuid)
            real.detach(node)
            assert await reader.until(REMOVED) == DeviceEvent(REMOVED, node)


@pytest.mark.asyncio
async def test_luks1_is_none_of_our_business(real):
    node = real.attach()
    real.format(node)
    async with reading(real.watcher(), node) as reader:
        await reader.until(ADDED)
        command = ("cryptsetup", "luksFormat", "--batch-mode", "--type", "luks1", "--pbkdf-force-iterations", "1000")
        run(*command, node, "-", data=b"x")
        real.settle()
        assert await reader.until(REMOVED) == DeviceEvent(REMOVED, node)
    async with reading(real.watcher(), node) as reader:
        uuid = real.format(node)
        assert await reader.next() == DeviceEvent(ADDED, node, uuid)


DEAF = "cannot hear udev, which is not in this network namespace"


@pytest.mark.asyncio
async def test_who_cannot_hear_udev_says_so(real, caplog):
    """In a network namespace of its own, without the socket: nothing comes."""
    node = real.attach()
    uuid = real.format(node)
    with other_network():
        async with reading(real.watcher(), node) as reader:
            assert await reader.next() == DeviceEvent(ADDED, node, uuid)
    (record,) = caplog.records
    assert (record.levelname, record.message[: len(DEAF)]) == ("WARNING", DEAF)


@pytest.mark.asyncio
@pytest.mark.parametrize(("network", "given"), [(nullcontext, False), (nullcontext, True), (other_network, True)])
async def test_who_hears_udev_says_nothing(real, caplog, network, given):
    node = real.attach()
    real.format(node)
    inherited = socket_unit() if given else None
    with network():
        async with reading(real.watcher(inherited=inherited), node) as reader:
            await reader.until(ADDED)
    assert caplog.records == []


def test_what_udev_says_of_a_node_that_cannot_be_read(real):
    volume, empty = real.attach(), real.attach()
    real.format(volume)
    for node in (volume, empty):
        real.touch(node)
    assert (may_hold_luks(volume), may_hold_luks(empty)) == (True, False)
    assert may_hold_luks("/dev/nowhere")


@pytest.mark.usefixtures("private_run")
def test_where_udev_has_not_looked_a_node_may_hold_anything(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    with loop_device(image) as node:
        assert may_hold_luks(node)


@pytest.mark.asyncio
async def test_a_device_that_is_not_ready_or_only_a_path_to_another_is_not_there(real):
    """A rule says what those of device-mapper and md say of theirs while suspended, and multipath's of its paths."""
    node = real.attach()
    uuid = real.format(node)
    async with reading(real.watcher(), node) as reader:
        await reader.until(ADDED)
        for reason in ('ENV{SYSTEMD_READY}="0"', 'ENV{DM_MULTIPATH_DEVICE_PATH}="1"'):
            real.rule(node, [reason])
            real.touch(node)
            assert await reader.until(REMOVED) == DeviceEvent(REMOVED, node)
            real.rule(node, ['ENV{CONTRACT}="1"'])
            real.touch(node)
            assert await reader.until(ADDED) == DeviceEvent(ADDED, node, uuid)


@pytest.mark.asyncio
async def test_a_node_that_disappears_is_gone(real):
    """A partition: unlike a loop device it really comes and goes ("add" and "remove")."""
    disk = real.attach()
    run("sfdisk", "--quiet", disk, data=b"label: gpt\nstart=2048, size=36864\n")
    with ExitStack() as undo:
        run("partx", "--add", disk)
        undo.callback(delete_partitions, disk)
        node = f"{disk}p1"
        uuid = real.format(node)
        async with reading(real.watcher(), node) as reader:
            assert await reader.until(ADDED) == DeviceEvent(ADDED, node, uuid)
            delete_partitions(disk)
            real.settle()
            assert await reader.until(REMOVED) == DeviceEvent(REMOVED, node)
            run("partx", "--add", disk)
            real.settle()
            assert await reader.until(ADDED) == DeviceEvent(ADDED, node, uuid)


def test_what_to_report_depends_on_what_was_known():
    known = {}
    traits = Traits(bus="usb")
    steps = [("", []), ("u", [ADDED]), ("u", [CHANGED]), ("v", [REMOVED, ADDED]), ("", [REMOVED]), ("", [])]
    for uuid, kinds in steps:
        events = list(transition(known, "/dev/x", Found(uuid, traits)))
        gone, there = DeviceEvent(REMOVED, "/dev/x"), DeviceEvent(ADDED, "/dev/x", uuid, traits=traits)
        assert events == [gone if kind is REMOVED else replace(there, kind=kind) for kind in kinds]
        assert known == ({"/dev/x": uuid} if uuid else {})


class Sysfs:
    """A device as pyudev shows it."""

    def __init__(self, path, parent=None, attributes=(), **properties):
        self.sys_path = f"/sys/devices/{path}"
        self.sys_name = path.rpartition("/")[2]
        self.properties = properties
        self.attributes = dict(attributes)
        self.device_links = ()
        self.action = "add"
        self._parent = parent

    def find_parent(self, subsystem):
        assert subsystem == "block"
        return self._parent


STICK = {"removable": b"1"}
FIXED = {"removable": b"0"}
SD = Sysfs("soc/mmc0/block/mmcblk0", None, FIXED | {"device/type": b"SD"})
EMMC = Sysfs("soc/mmc0/block/mmcblk0", None, FIXED | {"device/type": b"MMC"})


@pytest.mark.parametrize(
    ("device", "removable"),
    [
        (Sysfs("pci/block/sda", None, FIXED, ID_BUS="ata"), False),
        (Sysfs("pci/block/sda", None, FIXED, ID_BUS="usb"), True),
        (Sysfs("pci/block/sda", None, FIXED, ID_BUS="ieee1394"), True),
        (Sysfs("pci/block/sda", None, STICK, ID_BUS="ata"), True),
        (Sysfs("pci/block/sda/sda1", Sysfs("pci/block/sda", None, STICK)), True),
        (Sysfs("pci/block/sda/sda1", Sysfs("pci/block/sda", None, FIXED)), False),
        (Sysfs("pci/block/nvme0n1"), False),
        (SD, True),
        (Sysfs("soc/mmc0/block/mmcblk0/mmcblk0p2", SD), True),
        (EMMC, False),
        (Sysfs("soc/mmc0/block/mmcblk0/mmcblk0p2", EMMC), False),
        (Sysfs("pci/block/mspblk0", None, FIXED), True),
        (Sysfs("virtual/block/dm-0", None, FIXED, ID_BUS="usb"), False),
        (Sysfs("virtual/block/loop0", None, FIXED), False),
        (Sysfs("virtual/block/loop0", None, FIXED, UDISKS_SYSTEM="0"), True),
        (Sysfs("pci/block/sda", None, STICK, ID_BUS="usb", UDISKS_SYSTEM="1"), False),
        (Sysfs("pci/block/sda", None, STICK, ID_BUS="usb", UDISKS_SYSTEM="true"), False),
    ],
    ids=str,
)
def test_what_is_removable(device, removable):
    assert is_removable(device) is removable
    device.properties |= {"ID_FS_TYPE": "crypto_LUKS", "ID_FS_VERSION": "2", "ID_FS_UUID": "u"}
    device.device_links = ("/dev/disk/by-id/x", "/dev/disk/by-label/\udcff", "/dev/mapper/x")
    links = ("/dev/disk/by-id/x",)
    assert look(device) == Found("u", Traits(links, device.properties.get("ID_BUS", ""), removable))
