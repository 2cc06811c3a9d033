# SPDX-License-Identifier: GPL-2.0-or-later
"""luksrotd over the system bus (dbus/*.xml): every secret goes as a descriptor, and a job is followed to its end."""

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dbus_next.message import Message
from dbus_next.signature import Variant

from luksrotd import names
from luksrotd.ctl import calls, model
from luksrotd.ctl.connection import Connection, error_of, understood
from luksrotd.ctl.naming import uuid_of
from luksrotd.ctl.progress import DELIVERING
from luksrotd.errors import (
    Cancelled,
    InvalidRequest,
    LuksrotdError,
    Outcome,
    UnknownDevice,
    Unreachable,
)

#: How often somebody must interrupt who does not want to wait for the daemon's answer to the first time.
_PATIENCE: Final = 3


class Remote:
    """``model.Backend`` over the system bus."""

    def __init__(self) -> None:
        self._bus = Connection()
        self._interrupts = 0
        self._in_job = False

    async def devices(self) -> Sequence[model.Device]:
        """See ``model.Backend``."""
        reply = await self._bus.call(names.ROOT_PATH, (names.MANAGER_INTERFACE, "GetDevices"))
        with understood():
            paths = sorted(reply.body[0])
        found = [await self._bus.properties(path, names.DEVICE_INTERFACE) for path in paths]
        with understood():
            return [model.Device(volume["Node"]) for volume in found]

    async def volume(self, device: model.Device, *, data: bool) -> model.Volume:
        """See ``model.Backend``."""
        path = await self._object(device)
        found = await self._bus.properties(path, names.DEVICE_INTERFACE)
        read = {}
        if data:
            with understood():
                wanted = [key["name"].value for key in found["Keys"]]
            read = {name: await self._data(path, name) for name in wanted}
        with understood():
            return calls.volume(found, read)

    async def change(
        self, device: model.Device, request: model.KeyRequest, progress: model.Progress
    ) -> model.KeyChange:
        """See ``model.Backend``."""
        path = await self._object(device)
        group = await self._set_of(path, request.name) if request.alone else ""
        result = await self._job((path, names.DEVICE_INTERFACE), calls.change(request, group), request.new, progress)
        with understood(Outcome.COMMITTED):
            return calls.key_change(result)

    async def plan(self, device: model.Device, verb: str, name: str) -> model.Planned:
        """See ``model.Backend``."""
        path = await self._object(device)
        reply = await self._bus.call(path, (names.DEVICE_INTERFACE, "Plan"), "ssa{sv}", [verb, name, {}])
        with understood():
            return calls.planned(reply.body, name)

    async def change_set(
        self, devices: Sequence[model.Device], request: model.KeyRequest, progress: model.Progress
    ) -> model.SetChange:
        """See ``model.Backend``."""
        paths = [await self._object(device) for device in devices]
        call = calls.change_set(paths, request)
        result = await self._job((names.ROOT_PATH, names.MANAGER_INTERFACE), call, request.new, progress)
        with understood(Outcome.UNKNOWN):
            return calls.set_change(paths, result)

    async def set_status(self, devices: Sequence[model.Device], name: str, group: str | None) -> model.SetStatus:
        """See ``model.Backend``."""
        paths = [await self._object(device) for device in devices]
        body = [paths, name, {"group": Variant("s", group)} if group else {}]
        method = (names.MANAGER_INTERFACE, "GetSetStatus")
        reply = await self._bus.call(names.ROOT_PATH, method, "aosa{sv}", body)
        with understood():
            status, members = reply.body
            return calls.set_status(name, paths, calls.values(status), [calls.values(one) for one in members])

    async def scrub(self, device: model.Device, progress: model.Progress, if_generation: int | None = None) -> int:
        """See ``model.Backend``."""
        target = (await self._object(device), names.DEVICE_INTERFACE)
        result = await self._job(target, calls.scrub(if_generation), None, progress)
        with understood(Outcome.COMMITTED):
            return int(result["bytes"])

    async def verify(self, device: model.Device, name: str, credential: model.Credential) -> bool:
        """See ``model.Backend``."""
        path, call = await self._object(device), calls.verify(name, credential)
        method = (names.DEVICE_INTERFACE, call.member)
        reply = await self._bus.call(path, method, call.signature, call.body, fds=call.fds)
        with understood():
            return bool(reply.body[0])

    async def reconcile(self, device: model.Device, *, dry_run: bool, retire_expired: bool = False) -> model.Reconciled:
        """See ``model.Backend``."""
        path, method = await self._object(device), (names.DEVICE_INTERFACE, "Reconcile")
        lost = Outcome.UNCHANGED if dry_run else Outcome.UNKNOWN
        body = [{"dry-run": Variant("b", dry_run), "retire-expired": Variant("b", retire_expired)}]
        try:
            reply = await self._bus.call(path, method, body=body, lost=lost)
        except asyncio.CancelledError:
            raise Cancelled("cannot wait any longer: the reconcile was interrupted", outcome=lost) from None
        differences = await self._differences(path, retire_expired=retire_expired) if dry_run else None
        with understood(lost):
            found, left = reply.body
            return model.Reconciled(calls.findings(found), calls.findings(left), differences)

    async def history(self, device: model.Device | None, since: int, limit: int) -> Sequence[Mapping[str, Any]]:
        """See ``model.Backend``."""
        options = {"since": Variant("t", since), "limit": Variant("u", limit)}
        if device is not None and (uuid := uuid_of(device.name)):
            options["uuid"] = Variant("s", uuid)  # of a volume that need not be there
        elif device is not None:
            options["device"] = Variant("o", await self._object(device))
        reply = await self._bus.call(names.ROOT_PATH, (names.MANAGER_INTERFACE, "GetHistory"), body=[options])
        with understood():
            return [{**entry, "time": int(entry["time"])} for entry in map(calls.values, reply.body[0])]

    def interrupt(self, task: asyncio.Task[Any]) -> None:
        """Ask the job to stop and go on waiting for its end; where there is no job, or no patience left, stop."""
        self._interrupts += 1
        if self._in_job and self._interrupts < _PATIENCE:
            self._bus.signals.put_nowait(None)
        else:
            task.cancel()

    async def close(self) -> None:
        """Leave the bus; what the daemon still does for this connection alone ends."""
        self._bus.close()

    async def _object(self, device: model.Device) -> str:
        if device.header is not None:
            raise InvalidRequest("cannot use --header over the bus: see --direct")
        body = [uuid_of(device.name) or _block_device(device.name), {}]
        reply = await self._bus.call(names.ROOT_PATH, (names.MANAGER_INTERFACE, "GetDevice"), "sa{sv}", body)
        with understood():
            return str(reply.body[0])

    async def _differences(self, path: str, *, retire_expired: bool) -> Sequence[model.Difference] | None:
        """What a reconcile would change; None where nobody can tell."""
        body = ["reconcile", "", {"retire-expired": Variant("b", retire_expired)}]
        try:
            reply = await self._bus.call(path, (names.DEVICE_INTERFACE, "Plan"), "ssa{sv}", body)
        except LuksrotdError:  # a copy of another volume, say: what has been found can be told all the same
            return None
        with understood():
            return [calls.difference(one) for one in reply.body[1]]

    async def _data(self, path: str, name: str) -> Mapping[str, Any] | None:
        try:
            reply = await self._bus.call(path, (names.DEVICE_INTERFACE, "GetData"), "sa{sv}", [name, {}])
        except LuksrotdError:  # not authorized, or two keys of that name: the rest can be shown all the same
            return None
        with understood():
            data = json.loads(reply.body[0])
        return data if isinstance(data, dict) else None

    async def _set_of(self, path: str, name: str) -> str:
        """The set that the staged key of that name belongs to; '' if there is none."""
        found = await self._bus.properties(path, names.DEVICE_INTERFACE)
        with understood():
            staged = [key for key in calls.keys(found, {}) if (key.name, key.state) == (name, "staged")]
        return staged[0].set if len(staged) == 1 else ""

    async def _job(
        self,
        target: tuple[str, str],
        call: calls.Call,
        new: int | model.Delivery | None,
        progress: model.Progress,
    ) -> Mapping[str, Any]:
        """The Result of the job that a call starts on ``target``, an object path and an interface."""
        await self._bus.listen()
        path, interface = target
        self._in_job = True
        try:
            reply = await self._bus.call(
                path, (interface, call.member), call.signature, call.body, fds=call.fds, lost=Outcome.UNKNOWN
            )
            with understood(Outcome.UNKNOWN):
                job = str(reply.body[0])
            return await self._result(job, await self._follow(job, new, progress))
        except asyncio.CancelledError:
            raise Cancelled("cannot wait any longer: the daemon goes on", outcome=Outcome.UNKNOWN) from None
        finally:
            self._in_job = False

    async def _result(self, job: str, failure: LuksrotdError | None) -> Mapping[str, Any]:
        """The Result of a job that has ended; raises ``failure``, but where the Result tells of several volumes.

        Nothing that goes wrong here changes what is known of the device.
        """
        if isinstance(failure, Unreachable):
            raise failure
        known = Outcome.COMMITTED if failure is None else failure.outcome
        try:
            found = await self._bus.properties(job, names.JOB_INTERFACE)
            with understood():
                result = calls.values(found["Result"])
        except LuksrotdError as error:
            raise failure or type(error)(error.message, outcome=known) from error
        if failure is not None and "members" not in result:
            raise failure
        return result

    async def _follow(
        self, job: str, new: int | model.Delivery | None, progress: model.Progress
    ) -> LuksrotdError | None:
        """Wait for the end of the job, and deliver its key meanwhile; the error that it ended with."""
        undelivered: LuksrotdError | None = None
        while True:
            event = await self._bus.signals.get()
            if event is None:
                await self._cancel(job)
            elif event.member == "NameOwnerChanged":
                if event.body[1] == self._bus.owner:  # not one that was replaced before the job began
                    return Unreachable("cannot go on: luksrotd has gone from the system bus", outcome=Outcome.UNKNOWN)
            elif event.path != job:
                continue
            elif event.member == "Completed":
                with understood(Outcome.UNKNOWN):
                    return _end(event.body, undelivered)
            elif stage := _stage(event):
                progress(stage)
                if stage == DELIVERING and new is not None and not isinstance(new, int):
                    undelivered = await self._take(job, new)
                    new = None  # a set of volumes comes by here for each of them

    async def _take(self, job: str, delivery: model.Delivery) -> LuksrotdError | None:
        """Make the key safe; if that cannot be, stop the job before it commits."""
        try:
            delivery.check()
            reply = await self._bus.call(job, (names.JOB_INTERFACE, "TakeKey"))
            with understood():
                fd = reply.unix_fds[reply.body[0]]
            try:
                delivery.deliver(fd)
            finally:
                os.close(fd)
            await self._bus.call(job, (names.JOB_INTERFACE, "ConfirmKey"))
        except LuksrotdError as error:
            await self._cancel(job)
            return error
        return None

    async def _cancel(self, job: str) -> None:
        try:
            await self._bus.call(job, (names.JOB_INTERFACE, "Cancel"))
        except LuksrotdError:
            return  # it cannot be cancelled any more, and its end will tell the rest


def _block_device(name: str) -> str:
    path = Path(name).absolute()
    if path.is_dir():
        raise UnknownDevice(f"cannot use {name}: it is a directory")
    return str(path)


def _stage(event: Message) -> str:
    """The stage that a job has entered; '' if something else of it has changed."""
    with understood(Outcome.UNKNOWN):
        changed = event.body[1] if event.member == "PropertiesChanged" else {}
        return str(changed["Stage"].value) if "Stage" in changed else ""


def _end(completed: Sequence[Any], undelivered: LuksrotdError | None) -> LuksrotdError | None:
    """The error, if any, that a job has ended with."""
    success, outcome, name, text = completed
    if success:
        return None
    told = error_of(name, text)
    known = Outcome(outcome) if outcome in list(Outcome) else Outcome.UNKNOWN
    return undelivered if undelivered and known is Outcome.UNCHANGED else type(told)(told.message, outcome=known)
