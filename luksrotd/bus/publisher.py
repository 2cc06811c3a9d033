# SPDX-License-Identifier: GPL-2.0-or-later
"""Exports volumes and jobs as they come, and withdraws them as they go."""

from typing import Protocol

from luksrotd import names
from luksrotd.bus.convert import device_path, job_path
from luksrotd.bus.device import Device
from luksrotd.bus.guard import Guard
from luksrotd.bus.interface import Interface
from luksrotd.bus.job import Job
from luksrotd.bus.manager import Manager
from luksrotd.bus.secrets import Keyring
from luksrotd.service import jobs
from luksrotd.service.operations import Operations
from luksrotd.service.registry import Registry, Volume
from luksrotd.service.runner import Runner


class Exporting(Protocol):
    """What is needed of ``Bus``."""

    def export(self, path: str, interface: Interface) -> None:
        """Export an interface."""

    def unexport(self, path: str, interface: Interface | str | None = None) -> None:
        """Stop exporting it, or the object."""


class Publisher:
    """Observes the registry and the runner; ``publish`` begins with what is there."""

    def __init__(
        self,
        bus: Exporting,
        guard: Guard,
        keyring: Keyring,
        operations: Operations,
        registry: Registry,
        runner: Runner,
    ) -> None:
        self._bus = bus
        self._guard = guard
        self._keyring = keyring
        self._operations = operations
        self._registry = registry
        self._runner = runner
        self._devices: dict[str, Device] = {}

    def publish(self) -> None:
        """Export everything, from now on."""
        self._bus.export(names.ROOT_PATH, Manager(self._guard, self._registry))
        self._registry.observe(self)
        self._runner.observe(self)
        for volume in self._registry.volumes.values():
            self.volume_added(volume)
        for job in self._runner.jobs.values():
            self.job_added(job)

    def withdraw(self) -> None:
        """Observe no more: the connection is over."""
        self._registry.unobserve(self)
        self._runner.unobserve(self)

    def volume_added(self, volume: Volume) -> None:
        """Export it."""
        device = Device(self._guard, self._keyring, self._operations, self._runner, volume)
        self._devices[volume.uuid] = device
        self._bus.export(device_path(volume.uuid), device)

    def volume_changed(self, volume: Volume, *, fresh: bool) -> None:
        """Show what changed."""
        self._devices[volume.uuid].show(volume)

    def volume_removed(self, volume: Volume) -> None:
        """Withdraw it."""
        del self._devices[volume.uuid]
        self._bus.unexport(device_path(volume.uuid))

    def job_added(self, job: jobs.Job) -> None:
        """Export it, if somebody started it and its method returns it."""
        if job.owner is not None and job.kind not in jobs.UNSEEN:
            self._bus.export(job_path(job.number), Job(self._guard, self._runner, job, job.owner))
        self._show_busy(job)

    def job_ended(self, job: jobs.Job) -> None:
        """Its volume may be idle again."""
        self._show_busy(job)

    def job_forgotten(self, job: jobs.Job) -> None:
        """Withdraw it."""
        self._bus.unexport(job_path(job.number))

    def _show_busy(self, job: jobs.Job) -> None:
        for uuid in job.volumes:
            device = self._devices.get(uuid)
            if device is not None:
                device.show()
