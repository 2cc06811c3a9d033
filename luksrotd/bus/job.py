# SPDX-License-Identifier: GPL-2.0-or-later
"""``org.luksrotd1.Job`` (dbus/org.luksrotd1.Job.xml)."""

from collections.abc import Mapping, Sequence
from typing import Any

from dbus_next.signature import Variant

from luksrotd import names
from luksrotd.bus.convert import device_path
from luksrotd.bus.errors import name_of
from luksrotd.bus.exposed import UNPRIVILEGED, exposed
from luksrotd.bus.guard import Guard
from luksrotd.bus.interface import Emits, Exporter, Interface, emitted, readable
from luksrotd.bus.results import result_property
from luksrotd.errors import InvalidRequest
from luksrotd.ports import Caller
from luksrotd.service import jobs
from luksrotd.service.runner import Runner


class Job(Interface):
    """A job that somebody started."""

    def __init__(self, guard: Guard, runner: Runner, job: jobs.Job, owner: Caller) -> None:
        super().__init__(names.JOB_INTERFACE, guard)
        self._runner = runner
        self._job = job
        self._owner = owner
        self._completed = False
        self._shown = self.values()
        job.subscribe(self._show)

    async def details(self, method: str, arguments: Sequence[Any]) -> Mapping[str, str]:
        """What the job is about."""
        return {"uuid": " ".join(self._job.volumes), "key": self._job.key_name}

    def exported(self, bus: Exporter | None, path: str) -> None:
        """Follow the job for as long as it is exported."""
        super().exported(bus, path)
        if bus is None:
            self._job.unsubscribe(self._show)

    def _show(self) -> None:
        before, self._shown = self._shown, self.values()
        self.changed(*(name for name, value in self._shown.items() if value != before[name]))
        if self._job.ended and not self._completed:
            self._completed = True
            self.completed(self._job.error is None, self.outcome, self.error_name, self.error_message)

    # -- methods --------------------------------------------------------------------------------------------------

    @exposed("a{sv}", "", action=UNPRIVILEGED, reason="the starter needs no right, and polkit is asked about others")
    async def cancel(self, caller: Caller, options: Mapping[str, Any]) -> None:
        """Stop before the point of no return."""
        if caller.uid != self._owner.uid:
            details = {"operation": "Cancel", **await self.details("Cancel", [])}
            await self.guard.authorize(caller, names.ACTION_CANCEL, details)
        self._runner.cancel(self._job)

    @exposed("a{sv}", "h", action=UNPRIVILEGED, reason="only for the connection that started the job", outputs=["key"])
    async def take_key(self, caller: Caller, options: Mapping[str, Any]) -> int:
        """The generated key."""
        handover = self._job.handover
        if handover is None:
            raise InvalidRequest("cannot hand over a key: the job generates none")
        return await handover.take(caller)

    @exposed("a{sv}", "", action=UNPRIVILEGED, reason="only for the connection that started the job")
    async def confirm_key(self, caller: Caller, options: Mapping[str, Any]) -> None:
        """The generated key has been stored: the old one may die."""
        handover = self._job.handover
        if handover is None:
            raise InvalidRequest("cannot confirm a key: the job generates none")
        handover.confirm(caller)

    @emitted("bsss", "success", "outcome", "error_name", "error_message")
    def completed(self, success: bool, outcome: str, error_name: str, error_message: str) -> None:
        """Its end."""

    # -- properties -----------------------------------------------------------------------------------------------

    @readable("s", emits=Emits.CONST)
    def kind(self) -> str:
        """What it does: ``service.jobs.Kind``."""
        return self._job.kind.value

    @readable("ao", emits=Emits.CONST)
    def devices(self) -> list[str]:
        """Paths of the volumes."""
        return [device_path(uuid) for uuid in self._job.volumes]

    @readable("s", emits=Emits.CONST)
    def key_name(self) -> str:
        """Name of the managed key."""
        return self._job.key_name

    @readable("u", emits=Emits.CONST)
    def started_by_uid(self) -> int:
        """Who started it."""
        return self._owner.uid

    @readable("s")
    def state(self) -> str:
        """Where it is in its life."""
        return self._job.state.value

    @readable("s")
    def stage(self) -> str:
        """Stage or phase that it entered last."""
        return self._job.step.value

    @readable("d")
    def progress(self) -> float:
        """From 0 to 1."""
        return self._job.progress

    @readable("b")
    def progress_estimated(self) -> bool:
        """Whether ``progress`` is an estimate by time now."""
        return self._job.estimated

    @readable("b")
    def cancellable(self) -> bool:
        """Whether it can still be stopped."""
        return self._job.cancellable

    @readable("s")
    def outcome(self) -> str:
        """What the volume holds because of it; '' before its end."""
        return self._job.outcome.value if self._job.outcome else ""

    @readable("s")
    def error_name(self) -> str:
        """D-Bus error name; '' if there is none."""
        return name_of(self._job.error) if self._job.error else ""

    @readable("s")
    def error_message(self) -> str:
        """What went wrong."""
        return self._job.error.message if self._job.error else ""

    @readable("a{sv}")
    def result(self) -> dict[str, Variant]:
        """What became of the key."""
        return result_property(self._job.result)
