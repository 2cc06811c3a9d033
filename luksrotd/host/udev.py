# SPDX-License-Identifier: GPL-2.0-or-later
"""LUKS2 devices as udev sees them come, change and go.

The monitor is started before the devices are enumerated, so nothing falls in between; what is in both is reported
twice, which is harmless.  What waits to be reported is one state per node, not a list of events: however many events
a device had, the reader is told once what became of it, and the queue is no longer than the number of devices.
"""

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import pyudev

from luksrotd.errors import DeviceError
from luksrotd.ports import DeviceEvent, WatchEvent

RECEIVE_BUFFER: Final = 16 * 1024 * 1024
"""Bytes of netlink queue; a large machine sends thousands of events at boot."""

_BATCH: Final = 64
"""Events taken from the queue before the rest of the loop has its turn."""


class UdevWatcher:
    """``ports.Watcher`` on one event loop, without threads.  ``receive_buffer`` in bytes."""

    def __init__(self, *, receive_buffer: int = RECEIVE_BUFFER) -> None:
        self._receive_buffer = receive_buffer
        self._known: dict[str, str] = {}
        self._pending: dict[str, str] = {}
        self._wake = asyncio.Event()
        self._failure: OSError | None = None
        self._rescan = False
        self._closed = False

    async def events(self) -> AsyncIterator[DeviceEvent]:
        """First one ADDED for each LUKS2 device, then what happens; ends after ``close``.  May be called once.

        When the kernel had to drop events, every known device is reported as CHANGED, and those that came or went
        meanwhile as ADDED or REMOVED.  Raises ``DeviceError`` when udev cannot be followed.
        """
        try:
            context = pyudev.Context()
            monitor = _start_monitor(context, self._receive_buffer)
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

    def _receive(self, monitor: Any) -> None:
        try:
            for _ in range(_BATCH):
                device = monitor.poll(timeout=0)
                if device is None:
                    break
                if device.device_node:
                    self._note(device.device_node, luks2_uuid(device))
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
            device.device_node: luks2_uuid(device)
            for device in context.list_devices(subsystem="block", ID_FS_TYPE="crypto_LUKS")
            if device.device_node
        }
        for node in (self._known.keys() | self._pending.keys()) - found.keys():
            self._note(node, "")
        for node, uuid in found.items():
            self._note(node, uuid)

    def _note(self, node: str, uuid: str) -> None:
        self._pending.pop(node, None)  # to the end of the queue
        self._pending[node] = uuid


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


def luks2_uuid(device: Any) -> str:
    """The LUKS UUID if the pyudev device is there, ready and LUKS2; else ''."""
    properties = device.properties
    if device.action == "remove" or properties.get("SYSTEMD_READY") == "0":
        return ""
    if properties.get("ID_FS_TYPE") != "crypto_LUKS" or properties.get("ID_FS_VERSION") != "2":
        return ""
    return str(properties.get("ID_FS_UUID", ""))


def transition(known: dict[str, str], node: str, uuid: str) -> Iterator[DeviceEvent]:
    """What to report when ``node`` now holds the LUKS2 volume ``uuid`` ('' for none); keeps ``known`` up to date.

    A node that got another volume is reported as gone and come.
    """
    before = known.pop(node, "")
    if uuid:
        known[node] = uuid
    if before and before != uuid:
        yield DeviceEvent(WatchEvent.REMOVED, node)
    if uuid:
        yield DeviceEvent(WatchEvent.CHANGED if before == uuid else WatchEvent.ADDED, node, uuid)
