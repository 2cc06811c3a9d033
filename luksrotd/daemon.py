# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon: puts the parts together, starts them in order, and stops them in order."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import luksrotd
from luksrotd import direct
from luksrotd.bus import service
from luksrotd.bus.authority import PolkitAuthority
from luksrotd.bus.caller import Callers
from luksrotd.bus.connection import Bus
from luksrotd.bus.guard import Guard
from luksrotd.bus.publisher import Publisher
from luksrotd.bus.secrets import Keyring
from luksrotd.bus.served import Served
from luksrotd.errors import LuksrotdError
from luksrotd.host.hardening import harden
from luksrotd.host.history import JournalHistory
from luksrotd.host.keeping import PipeKeeper
from luksrotd.host.notify import ServiceManager, watchdog_interval
from luksrotd.host.process import client_and_unit
from luksrotd.host.sealed import SecretMemfd
from luksrotd.host.udev import UdevWatcher
from luksrotd.ports import Devices, Host, Watcher
from luksrotd.service.audit import Audit
from luksrotd.service.denials import RecordedAuthority
from luksrotd.service.drafts import Drafts
from luksrotd.service.history import Chronicle
from luksrotd.service.operations import Operations
from luksrotd.service.owned import Means
from luksrotd.service.registry import Registry
from luksrotd.service.runner import Runner
from luksrotd.service.setjobs import SetJobs
from luksrotd.service.sets import VolumeSets
from luksrotd.service.volume import Volumes

log = logging.getLogger(__name__)

SCAN_SECONDS: Final = 15.0
"""How long the start waits for volumes that were there before; a dead disk must not keep all others away."""


class Daemon:
    """The daemon on one bus connection; ``host`` and ``watcher`` are the ports that it works with."""

    def __init__(self, bus: Bus, host: Host, watcher: Watcher, manager: ServiceManager) -> None:
        self._bus = bus
        self._watcher = watcher
        self._manager = manager
        self._callers = Callers(bus, client_and_unit)
        volumes = Volumes(host)
        self._runner = Runner()
        self._registry = Registry(volumes, watcher)
        operations = Operations(volumes, self._registry, self._runner)
        self._audit = Audit(host)
        guard = Guard(self._callers, RecordedAuthority(PolkitAuthority(bus), self._audit, host.clock))
        keyring = Keyring(guard, SecretMemfd)
        self._drafts = Drafts(host, Means(self._registry, self._runner, PipeKeeper()), self._callers.gone)
        served = Served(
            operations,
            SetJobs(VolumeSets(host), self._registry, self._runner),
            self._drafts,
            self._registry,
            self._runner,
            Chronicle(JournalHistory()),
        )
        self._publisher = Publisher(bus, guard, keyring, served)

    async def run(self, stop: asyncio.Event) -> int:
        """Serve until ``stop`` is set; the exit status: 0 if it was, 1 if the name, the bus or udev cannot be had."""
        await self._callers.watch()
        self._publisher.publish()
        ends = {
            "": asyncio.create_task(stop.wait()),
            "the bus connection was lost": asyncio.create_task(service.lost(self._bus)),
            "the bus name was refused": asyncio.create_task(self._start()),
            "udev was lost": asyncio.create_task(self._follow()),
        }
        watchdog = asyncio.create_task(_watchdog(self._manager))
        await asyncio.wait(ends.values(), return_when=asyncio.FIRST_COMPLETED)
        lost = [reason for reason, task in ends.items() if reason and task.done()]
        self._manager.stopping("finishing what must be finished")
        # While the bus is still there, so that clients learn what became of their jobs.
        self._drafts.close()
        await self._runner.drain()
        for task in (*ends.values(), watchdog):
            task.cancel()
        await asyncio.wait([*ends.values(), watchdog])
        await self._bus.close()
        self._audit.stopped(", ".join(lost))
        for reason in lost:
            log.error("cannot go on: %s", reason, exc_info=ends[reason].exception())
        return 1 if lost else 0

    async def _start(self) -> None:
        """Take the name when there is something to show: the call that activated the daemon waits for that.

        Returns only if the name cannot be had.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(SCAN_SECONDS):
                await self._registry.scanned()
        try:
            await service.own_name(self._bus)
        except ConnectionError as error:
            log.error("%s", error)
            return
        self._audit.started(luksrotd.__version__)
        self._manager.ready(f"{len(self._registry.volumes)} volumes")
        await asyncio.get_running_loop().create_future()

    async def _follow(self) -> None:
        try:
            await self._registry.run()
        except* LuksrotdError as errors:
            for error in errors.exceptions:
                log.error("%s", error)


async def _watchdog(manager: ServiceManager) -> None:
    interval = watchdog_interval()
    while interval is not None:
        manager.watchdog()
        await asyncio.sleep(interval)


@dataclass(frozen=True, slots=True)
class Decorators:
    """What to put around real ports.  Nothing in the product does; tests wrap them to fail, and to see less."""

    devices: Callable[[Devices], Devices] = lambda devices: devices
    watcher: Callable[[Watcher], Watcher] = lambda watcher: watcher


async def serve(decorators: Decorators) -> int:
    """Connect to the system bus and serve until SIGTERM or SIGINT; the exit status."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_on_loop_error)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        bus = await service.connect()
    except ConnectionError as error:
        log.error("cannot serve: %s", error)
        return 1
    host = direct.build_host()
    host = replace(host, devices=decorators.devices(host.devices))
    return await Daemon(bus, host, decorators.watcher(UdevWatcher()), ServiceManager()).run(stop)


def launch(decorators: Decorators | None = None) -> int:
    """Run the daemon in this process; the exit status."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s: %(name)s: %(message)s")
    if os.geteuid() != 0:
        log.error("cannot serve: must be run as root")
        return 1
    harden()
    return asyncio.run(serve(decorators or Decorators()))


def _on_loop_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody awaited: a bug, but not the end of the jobs under way."""
    log.error("%s", context.get("message", "error in the event loop"), exc_info=context.get("exception"))
