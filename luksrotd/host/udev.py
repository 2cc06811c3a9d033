# SPDX-License-Identifier: GPL-2.0-or-later
"""LUKS2 devices as udev sees them come, change and go.

The monitor is started before the devices are enumerated, so nothing falls in between; what is in both is reported
twice, which is harmless.  What waits to be reported is one state per node, not a list of events: however many events
a device had, the reader is told once what became of it, and the queue is no longer than the number of devices.
"""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import field
from pathlib import Path
from typing import Any, Final

import pyudev

from luksrotd.errors import DeviceError
from luksrotd.ports import DeviceEvent, Traits, WatchEvent
from luksrotd.records import dataclass

log = logging.getLogger(__name__)

RECEIVE_BUFFER: Final = 16 * 1024 * 1024
"""Bytes of netlink queue; a large machine sends thousands of events at boot."""

_BATCH: Final = 64
"""Events taken from the queue before the rest of the loop has its turn."""

#: The netlink sockets of this thread's network namespace (linux/netlink.h: the family and group of uevents).
_NETLINK_SOCKETS: Final = Path("/proc/thread-self/net/netlink")
_KOBJECT_UEVENT: Final = 15
_KERNEL_GROUP: Final = 1

_CARRIED_BUSES: Final = frozenset({"usb", "ieee1394"})
"""What is attached by these can be taken along, whatever its ``removable`` attribute says of its medium."""


@dataclass(frozen=True, slots=True)
class Found:
    """What udev says of a node; ``uuid`` is '' unless it holds a LUKS2 volume."""

    uuid: str = ""
    traits: Traits = field(default_factory=Traits)


NOTHING: Final = Found()


class UdevWatcher:
    """``ports.Watcher`` on one event loop, without threads.  ``receive_buffer`` in bytes.

    ``inherited``: a netlink socket that gets udev's events, for a process in a network namespace that udev is not in;
    it is this object's from then on.  Else one is opened.
    """

    def __init__(self, *, receive_buffer: int = RECEIVE_BUFFER, inherited: int | None = None) -> None:
        self._receive_buffer = receive_buffer
        self._inherited = inherited
        self._known: dict[str, str] = {}
        self._pending: dict[str, Found] = {}
        self._wake = asyncio.Event()
        self._failure: OSError | None = None
        self._rescan = False
        self._closed = False

    async def events(self) -> AsyncIterator[DeviceEvent]:
        """First one ADDED for each LUKS2 device, then what happens; ends after ``close``.  May be called once.

        When the kernel had to drop events, every known device is reported as CHANGED, and those that came or went
        meanwhile as ADDED or REMOVED.  Raises ``DeviceError`` when udev cannot be followed.
        """
        if self._inherited is None and not is_udev_near():
            log.warning(
                "cannot hear udev, which is not in this network namespace: what comes or goes from now on will not be "
                "noticed; luksrotd.service needs luksrotd-udev.socket (luksrotd(8), PROBLEMS)"
            )
        try:
            context = pyudev.Context()
            monitor = _start_monitor(context, self._receive_buffer)
            self._put_in_place(monitor)
        except (OSError, ImportError) as error:
            raise DeviceError(f"cannot follow udev: {error}") from error
        loop = asyncio.get_running_loop()
        descriptor = monitor.fileno()
        loop.add_reader(descriptor, self._receive, monitor)
        try:
            self._scan(context)
            while not self._closed:
                if self._rescan:
                    self._rescan = False
                    self._scan(context)
                while self._pending and not self._closed:
                    node = next(iter(self._pending))
                    for event in transition(self._known, node, self._pending.pop(node)):
                        yield event
                if self._failure is not None:
                    raise DeviceError(f"cannot follow udev: {self._failure.strerror}") from self._failure
                await self._wake.wait()
                self._wake.clear()
        finally:
            loop.remove_reader(descriptor)

    def close(self) -> None:
        """End ``events``; idempotent."""
        self._closed = True
        self._wake.set()

    def _put_in_place(self, monitor: Any) -> None:
        """Have libudev read from the socket that was inherited: it takes none, but goes by the number of its own."""
        if self._inherited is not None:
            fd, self._inherited = self._inherited, None
            try:
                os.set_blocking(fd, False)
                os.dup2(fd, monitor.fileno(), inheritable=False)
            finally:
                os.close(fd)

    def _receive(self, monitor: Any) -> None:
        try:
            for _ in range(_BATCH):
                device = monitor.poll(timeout=0)
                if device is None:
                    break
                if device.device_node:
                    self._note(device.device_node, look(device))
        except OSError as error:
            # pyudev's poll() fails on POLLERR with an OSError that does not say why, and leaves the reason pending.
            number = error.errno or _pending_error(monitor.fileno())
            if number in (0, errno.ENOBUFS):
                self._rescan = True
            else:
                self._failure = OSError(number, os.strerror(number))
                asyncio.get_running_loop().remove_reader(monitor.fileno())
        self._wake.set()

    def _scan(self, context: Any) -> None:
        found = {
            device.device_node: look(device)
            for device in context.list_devices(subsystem="block", ID_FS_TYPE="crypto_LUKS")
            if device.device_node
        }
        for node in (self._known.keys() | self._pending.keys()) - found.keys():
            self._note(node, NOTHING)
        for node, state in found.items():
            self._note(node, state)

    def _note(self, node: str, state: Found) -> None:
        self._pending.pop(node, None)  # to the end of the queue
        self._pending[node] = state


def is_udev_near() -> bool:
    """Whether udev, or systemd for it, listens to the kernel in this network namespace, the only one that it tells.

    True if that cannot be known.
    """
    try:
        _, *sockets = [line.split() for line in _NETLINK_SOCKETS.read_text().splitlines()]
        return any(
            int(family) == _KOBJECT_UEVENT and int(groups, 16) & _KERNEL_GROUP for _, family, _, groups, *_ in sockets
        )
    except (OSError, ValueError):
        return True


def _start_monitor(context: Any, receive_buffer: int) -> Any:
    monitor = pyudev.Monitor.from_netlink(context)
    monitor.filter_by("block")
    try:
        monitor.set_receive_buffer_size(receive_buffer)
    except OSError as error:
        if error.errno != errno.EPERM:  # needs CAP_NET_ADMIN; without it an overflow is likelier, and is handled
            raise
    monitor.start()
    return monitor


def _pending_error(descriptor: int) -> int:
    """Take the error that is pending on a socket."""
    with socket.socket(fileno=os.dup(descriptor)) as taken:
        return taken.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def look(device: Any) -> Found:
    """What is on the pyudev device, and what it is."""
    uuid = luks2_uuid(device)
    return Found(uuid, traits(device)) if uuid else NOTHING


def may_hold_luks(node: str) -> bool:
    """Whether udev says that the node holds a LUKS volume, or says nothing of it, for one that cannot be read."""
    try:
        device = pyudev.Devices.from_device_file(pyudev.Context(), node)
    except (OSError, ImportError, pyudev.DeviceNotFoundError):
        return True
    return not device.is_initialized or device.properties.get("ID_FS_TYPE") == "crypto_LUKS"


def luks2_uuid(device: Any) -> str:
    """The LUKS UUID if the pyudev device is there, ready and LUKS2, and no path to a multipath device; else ''."""
    properties = device.properties
    if device.action == "remove" or properties.get("SYSTEMD_READY") == "0":
        return ""
    if properties.get("DM_MULTIPATH_DEVICE_PATH") == "1":  # the device on top of it is the one that is used
        return ""
    if properties.get("ID_FS_TYPE") != "crypto_LUKS" or properties.get("ID_FS_VERSION") != "2":
        return ""
    return str(properties.get("ID_FS_UUID", ""))


def traits(device: Any) -> Traits:
    """What is known of the pyudev device beside its header."""
    # udev leaves nothing unprintable in a name that it makes; a rule might, and D-Bus would not take it.
    links = sorted(link for link in device.device_links if link.startswith("/dev/disk/") and link.isprintable())
    return Traits(tuple(links), str(device.properties.get("ID_BUS", "")), is_removable(device))


def is_removable(device: Any) -> bool:
    """Whether the pyudev device, or its medium, comes and goes with its user.

    As udisks(8) decides its HintSystem: by the bus, the medium, the kinds of cards, and a rule's UDISKS_SYSTEM above
    all.  Unlike there a soldered eMMC is none of the cards.  Virtual devices (device-mapper, md, loop) never are.
    """
    decided = device.properties.get("UDISKS_SYSTEM")
    if decided is not None:
        return decided.lower() not in ("1", "true")
    parent = device.find_parent("block")
    disk = device if parent is None else parent  # not "or": a pyudev device has a length
    if "/devices/virtual/" in disk.sys_path:
        return False
    return (
        device.properties.get("ID_BUS") in _CARRIED_BUSES
        or disk.attributes.get("removable") == b"1"
        or disk.sys_name.startswith(("msblk", "mspblk"))
        or (disk.sys_name.startswith("mmcblk") and disk.attributes.get("device/type") == b"SD")
    )


def transition(known: dict[str, str], node: str, state: Found) -> Iterator[DeviceEvent]:
    """What to report now that ``node`` is in this state; ``known``, the UUIDs by node, is kept up to date.

    A node that got another volume is reported as gone and come.
    """
    before = known.pop(node, "")
    if state.uuid:
        known[node] = state.uuid
    if before and before != state.uuid:
        yield DeviceEvent(WatchEvent.REMOVED, node)
    if state.uuid:
        kind = WatchEvent.CHANGED if before == state.uuid else WatchEvent.ADDED
        yield DeviceEvent(kind, node, state.uuid, traits=state.traits)
