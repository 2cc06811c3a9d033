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
from luksrotd.bus.served import Served
from luksrotd.bus.transaction import Transactions
from luksrotd.service import jobs
from luksrotd.service.registry import Volume


class Exporting(Protocol):
    """What is needed of ``Bus``."""

    def export(self, path: str, interface: Interface) -> None:
        """Export an interface."""

    def unexport(self, path: str, interface: Interface | str | None = None) -> None:
        """Stop exporting it, or the object."""


class Publisher:
    """Observes the registry and the runner; ``publish`` begins with what is there."""

    def __init__(self, bus: Exporting, guard: Guard, keyring: Keyring, served: Served) -> None:
        self._bus = bus
        self._guard = guard
        self._keyring = keyring
        self._served = served
        self._transactions = Transactions(bus, guard, keyring, served.operations)
        self._devices: dict[str, Device] = {}

    def publish(self) -> None:
        """Export everything, from now on."""
        self._bus.export(names.ROOT_PATH, Manager(self._guard, self._keyring, self._served))
        self._served.registry.observe(self)
        self._served.runner.observe(self)
        self._served.drafts.observe(self._transactions)
        for volume in self._served.registry.volumes.values():
            self.volume_added(volume)
        for job in self._served.runner.jobs.values():
            self.job_added(job)

    def withdraw(self) -> None:
        """Observe no more: the connection is over."""
        self._served.registry.unobserve(self)
        self._served.runner.unobserve(self)
        self._served.drafts.unobserve(self._transactions)

    def volume_added(self, volume: Volume) -> None:
        """Export it."""
        device = Device(self._guard, self._keyring, self._served, volume)
        self._devices[volume.uuid] = device
        self._bus.export(device_path(volume.uuid), device)

    def volume_changed(self, volume: Volume, *, fresh: bool) -> None:
        """Show what changed, and say so if it was somebody else."""
        device = self._devices[volume.uuid]
        device.show(volume)
        if volume.foreign is not None:
            device.foreign_change(volume.foreign.before, volume.foreign.after, volume.foreign.direction.value)

    def volume_removed(self, volume: Volume) -> None:
        """Withdraw it."""
        del self._devices[volume.uuid]
        self._bus.unexport(device_path(volume.uuid))

    def job_added(self, job: jobs.Job) -> None:
        """Export it, if somebody started it and its method returns it."""
        if job.owner is not None and job.kind not in jobs.UNSEEN:
            self._bus.export(job_path(job.number), Job(self._guard, self._served.runner, job, job.owner))
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
