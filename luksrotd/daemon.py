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
from luksrotd.bus.inhibitor import LogindInhibitor
from luksrotd.bus.link import Links, Outfit
from luksrotd.bus.served import Served
from luksrotd.config import Config
from luksrotd.configfile import Parsed, parse
from luksrotd.errors import ConfigError, LuksrotdError
from luksrotd.host import configfiles
from luksrotd.host.credentials import ServiceCredentials
from luksrotd.host.hardening import allow_files, harden
from luksrotd.host.heap import Quiet, share_heap
from luksrotd.host.history import JournalHistory
from luksrotd.host.images import ImageWatcher
from luksrotd.host.keeping import PipeKeeper
from luksrotd.host.memory import available_kib
from luksrotd.host.notify import UDEV_SOCKET, ServiceManager, StatusLine, inherited_socket, watchdog_interval
from luksrotd.host.process import client_and_unit
from luksrotd.host.sealed import SecretMemfd
from luksrotd.host.spare import Spare
from luksrotd.host.udev import UdevWatcher
from luksrotd.host.worker import WorkerEngine
from luksrotd.ports import Devices, Host, Watcher
from luksrotd.service.audit import Audit
from luksrotd.service.denials import RecordedAuthority
from luksrotd.service.drafts import Drafts
from luksrotd.service.history import Chronicle
from luksrotd.service.jobs import State
from luksrotd.service.operations import Operations
from luksrotd.service.owned import Means
from luksrotd.service.registry import Registry, Volume
from luksrotd.service.reporter import Reporter
from luksrotd.service.runner import Runner
from luksrotd.service.setjobs import SetJobs
from luksrotd.service.sets import VolumeSets
from luksrotd.service.threads import in_thread
from luksrotd.service.volume import Volumes

log = logging.getLogger(__name__)

SCAN_SECONDS: Final = 15.0
"""How long the start waits for volumes that were there before; a dead disk must not keep all others away."""
EXTEND_SECONDS: Final = 30.0
"""What the service manager is asked for while a commit is finished, again and again: a disk may be slow."""
EXTEND_TIMES: Final = 20
"""How often at most, so that a disk that hangs cannot keep the machine from going down."""
EXIT_CONFIG: Final = 78
"""Exit status for a configuration that cannot be used (EX_CONFIG, systemd.exec(5)): to start again would not help."""


def configuration() -> Parsed:
    """What the files of luksrotd.conf(5) say; blocks, raises ``ConfigError``."""
    return parse(configfiles.read())


class Daemon:
    """The daemon; ``host`` and ``watcher`` are the ports that it works with, ``read`` gets the configuration again."""

    def __init__(self, host: Host, watcher: Watcher, manager: ServiceManager, read: Callable[[], Parsed]) -> None:
        self._manager = manager
        self._read = read
        host = replace(host, inhibitor=LogindInhibitor(lambda: self._links.bus))
        volumes = Volumes(host)
        self._audit = Audit(host)
        self._links = Links(
            Outfit(
                client_and_unit,
                lambda asked: RecordedAuthority(asked, self._audit, host.clock),
                SecretMemfd,
                ServiceCredentials.of_environment().open,
            )
        )
        self._runner = Runner()
        self._images = ImageWatcher(direct.uuid_of)
        self._registry = Registry(volumes, watcher, self._images)
        drafts = Drafts(host, Means(self._registry, self._runner, PipeKeeper()), self._links.gone)
        self._served = Served(
            Operations(volumes, self._registry, self._runner),
            SetJobs(VolumeSets(host), self._registry, self._runner),
            drafts,
            self._registry,
            self._runner,
            Chronicle(JournalHistory()),
        )
        self._registry.observe(self)
        self._registry.observe(Reporter(self._audit))
        self._runner.observe(Quiet())
        self._line = StatusLine(manager, lambda: f"{len(self._registry.volumes)} volumes")

    def configure(self, config: Config) -> None:
        """Go by this configuration from now on; jobs and transactions under way are not touched."""
        limits = config.limits
        if limits.memory_kib is None:
            limits = replace(limits, memory_kib=available_kib() * limits.memory_percent // 100 or None)
        self._served.operations.configure(config)
        self._served.runner.configure(limits)
        self._served.drafts.configure(limits)
        self._served.registry.configure(config.devices)
        self._images.configure(config.volumes)

    async def run(self, stop: asyncio.Event, reload: asyncio.Event) -> int:
        """Serve until ``stop`` is set; the exit status: 0 if it was, 1 if the name, the bus or udev cannot be had.

        ``reload``: set when the configuration is to be read again.
        """
        ends = {
            "": asyncio.create_task(stop.wait()),
            "the bus or the name on it cannot be had": asyncio.create_task(self._serve(reload)),
            "udev was lost": asyncio.create_task(self._follow()),
        }
        watchdog = asyncio.create_task(_watchdog(self._manager))
        await asyncio.wait(ends.values(), return_when=asyncio.FIRST_COMPLETED)
        lost = [reason for reason, task in ends.items() if reason and task.done()]
        self._line.stopping("finishing what must be finished")
        # While the bus is still there, so that clients learn what became of their jobs.
        self._served.drafts.close()
        await self._drain()
        for task in (*ends.values(), watchdog):
            task.cancel()
        await asyncio.wait([*ends.values(), watchdog])
        await self._links.close()
        self._audit.stopped(", ".join(lost))
        for reason in lost:
            log.error("cannot go on: %s", reason, exc_info=ends[reason].exception())
        return 1 if lost else 0

    # -- the bus --------------------------------------------------------------------------------------------------

    async def _serve(self, reload: asyncio.Event) -> None:
        """Serve on one connection after the other; returns only if the first one, or the name on it, cannot be had.

        The name is taken when there is something to show: the call that activated the daemon waits for that.
        """
        try:
            await self._links.open(self._served)
            with suppress(TimeoutError):
                async with asyncio.timeout(SCAN_SECONDS):
                    await self._registry.scanned()
            await self._links.own_name()
        except ConnectionError as error:
            log.error("cannot serve: %s", error)
            return
        self._audit.started(luksrotd.__version__)
        self._line.ready()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._stay_connected())
            group.create_task(self._reload_whenever(reload))

    async def _stay_connected(self) -> None:
        while True:
            await self._links.lost()
            log.warning("the bus connection was lost; jobs go on")
            self._line.say("bus", "no system bus")
            await self._links.reopen(self._served)
            log.info("on the bus again")
            self._line.say("bus", "")

    # -- the configuration ----------------------------------------------------------------------------------------

    async def _reload_whenever(self, reload: asyncio.Event) -> None:
        while True:
            await reload.wait()
            reload.clear()
            self._line.reloading()
            trouble = ""
            try:
                self.configure(settled(await in_thread(self._read)))
                self._audit.configured()
            except ConfigError as error:
                log.error("%s; the old configuration stays", error)
                self._audit.misconfigured(error.message)
                trouble = f"{error}; the old configuration stays"
            self._line.ready(configuration=trouble)

    # -- what the service manager shows ---------------------------------------------------------------------------

    def volume_added(self, volume: Volume) -> None:
        """Count it."""
        self._line.show()

    def volume_changed(self, volume: Volume, *, fresh: bool) -> None:
        """Nothing."""

    def volume_removed(self, volume: Volume) -> None:
        """Count it no more."""
        self._line.show()

    # -- the rest -------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        extending = asyncio.create_task(self._extend())
        try:
            await self._runner.drain()
        finally:
            extending.cancel()

    async def _extend(self) -> None:
        """Have the service manager wait for a commit on a slow disk, for a while."""
        for _ in range(EXTEND_TIMES):
            if any(job.state is State.COMMITTING for job in self._runner.jobs.values()):
                self._manager.extend(EXTEND_SECONDS)
            await asyncio.sleep(EXTEND_SECONDS / 2)

    async def _follow(self) -> None:
        try:
            await self._images.ready()
            await self._registry.run()
        except* LuksrotdError as errors:
            for error in errors.exceptions:
                log.error("%s", error)


def settled(parsed: Parsed) -> Config:
    """The configuration, its warnings being logged."""
    for warning in parsed.warnings:
        log.warning("%s", warning)
    return parsed.config


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
    configuration: Callable[[], Parsed] = configuration
    spare: bool = True


async def serve(decorators: Decorators) -> int:
    """Serve on the system bus until SIGTERM or SIGINT; the exit status."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_on_loop_error)
    stop, reload = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    manager = ServiceManager()
    try:
        config = settled(decorators.configuration())
    except ConfigError as error:
        log.error("%s", error)
        manager.status(str(error))
        return EXIT_CONFIG
    async with Spare() as spare:
        host = direct.build_host(engine=WorkerEngine(spare=spare if decorators.spare else None))
        host = replace(host, devices=decorators.devices(host.devices))
        daemon = Daemon(
            host,
            decorators.watcher(UdevWatcher(inherited=inherited_socket(UDEV_SOCKET))),
            manager,
            decorators.configuration,
        )
        daemon.configure(config)
        return await daemon.run(stop, reload)


def launch(decorators: Decorators | None = None) -> int:
    """Run the daemon in this process; the exit status."""
    _log_to_stderr("%(levelname)s: %(name)s: %(message)s")
    if os.geteuid() != 0:
        log.error("cannot serve: must be run as root")
        return 1
    harden()
    allow_files()
    share_heap()
    return asyncio.run(serve(decorators or Decorators()))


def check_config() -> int:
    """Read the configuration and say what is wrong with it; the exit status: 0 nothing (but for warnings), else 78."""
    _log_to_stderr("%(levelname)s: %(message)s")
    try:
        settled(configuration())
    except ConfigError as error:
        log.error("%s", error)
        return EXIT_CONFIG
    return 0


def _log_to_stderr(form: str) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=form)


def _on_loop_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody awaited: a bug, but not the end of the jobs under way."""
    log.error("%s", context.get("message", "error in the event loop"), exc_info=context.get("exception"))
