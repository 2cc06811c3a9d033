# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon with something wrong: ``python -m tests.support.daemon_launcher FAULT``.

The product has no hooks for this; the devices that it works with are wrapped.  FAULT is a JSON object:

``{"kill": N, "when": "before" | "after"}``  SIGKILL at the N-th (from 0) write or flush of the process
``{"hold": N, "reached": FILE, "go": FILE}``  before the N-th, make FILE and wait until the other is there
``{"prefix": TEXT}``                          with either: see only loop devices of images that are named so
``{"config": DIRECTORY}``                     with either: luksrotd.conf, and luksrotd.conf.d in it
``{"spare": true}``                           with either: keep a worker started ahead, as the daemon does by itself,
                                              but not here, where processes and descriptors are counted
``{"census": FILE}``                          with either: tell at SIGUSR1 what it holds (``tests.support.census``)
"""

import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from luksrotd import daemon
from luksrotd.configfile import parse
from luksrotd.host import configfiles
from luksrotd.ports import DeviceEvent, DeviceRef, Devices, HeaderDevice, Watcher, WatchEvent
from tests.support import census


class Fault:
    """What is to happen, and how many writes and flushes there were."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._count = 0

    def before(self) -> None:
        """A write or flush is about to be made."""
        number = self._count
        if self._plan.get("kill") == number and self._plan["when"] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._plan.get("hold") == number:
            Path(self._plan["reached"]).touch()
            while not Path(self._plan["go"]).exists():
                time.sleep(0.002)

    def after(self) -> None:
        """It was made."""
        if self._plan.get("kill") == self._count and self._plan["when"] == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        self._count += 1


class FaultyDevice:
    """A header device that is wrapped."""

    def __init__(self, device: HeaderDevice, fault: Fault) -> None:
        self._device = device
        self._fault = fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def write(self, offset: int, data: bytes) -> None:
        """Write, or not."""
        self._fault.before()
        self._device.write(offset, data)
        self._fault.after()

    def flush(self) -> None:
        """Flush, or not."""
        self._fault.before()
        self._device.flush()
        self._fault.after()


class FaultyDevices:
    """Opens such devices."""

    def __init__(self, devices: Devices, fault: Fault) -> None:
        self._devices = devices
        self._fault = fault

    def open(self, ref: DeviceRef, *, writable: bool = False) -> Any:
        """Open and wrap."""
        return FaultyDevice(self._devices.open(ref, writable=writable), self._fault)


class OwnLoops:
    """A watcher that sees only our own loop devices: all others belong to whoever works on this machine."""

    def __init__(self, watcher: Watcher, prefix: str) -> None:
        self._watcher = watcher
        self._prefix = prefix
        self._own: set[str] = set()

    async def events(self) -> AsyncIterator[DeviceEvent]:
        """Those of the watcher that are about them."""
        async for event in self._watcher.events():
            if event.kind is not WatchEvent.REMOVED and self._is_own(event.node):
                self._own.add(event.node)
            if event.node in self._own:
                yield event

    def close(self) -> None:
        """Close the watcher."""
        self._watcher.close()

    def _is_own(self, node: str) -> bool:
        device = Path("/sys/class/block", Path(node).name).resolve()
        for disk in (device, device.parent):  # a partition is below its disk
            try:
                backing = (disk / "loop" / "backing_file").read_text()
            except OSError:
                continue
            return Path(backing).name.startswith(self._prefix)
        return False


def main(argument: str) -> int:
    """Run the daemon with that fault."""
    plan = json.loads(argument)
    fault = Fault(plan)
    config = plan.get("config", "/nonexistent")
    if "census" in plan:
        census.tell_at_signal(Path(plan["census"]))
    decorators = daemon.Decorators(
        devices=lambda devices: FaultyDevices(devices, fault),
        watcher=lambda watcher: OwnLoops(watcher, plan["prefix"]),
        spare=plan.get("spare", False),
        configuration=lambda: parse(configfiles.read(f"{config}/luksrotd.conf", [f"{config}/luksrotd.conf.d"])),
    )
    return daemon.launch(decorators)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
