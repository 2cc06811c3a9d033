# SPDX-License-Identifier: GPL-2.0-or-later
"""Rotation in two steps, on one volume or on a set of them: stage, then finish or abort."""

import argparse
from typing import TYPE_CHECKING, Final

from luksrotd.ctl.arguments import (
    Verbs,
    add_credential,
    add_device,
    add_engine,
    add_name,
    add_new_secret,
    check_engine,
    check_new_secret,
)
from luksrotd.ctl.model import Device, KeyChange, KeyRequest, Progress
from luksrotd.ctl.offline.base import call
from luksrotd.ctl.offline.setreport import set_changed, set_status
from luksrotd.ctl.report import Report, changed
from luksrotd.ctl.request import duration, key_request, only, prints_key
from luksrotd.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from luksrotd.ctl.local import Local
    from luksrotd.ports import DeviceRef

_EXPIRES: Final = "30d"
_SET_HELP: Final = """\
Several volumes are a set that gets the same key: it is staged on all of them, or else on none, and it can be
finished only when it is staged on all.  After an interruption, stage again with the same key: what is staged
already is left as it is."""


def add(verbs: Verbs) -> None:
    """The verbs."""
    verbs.group("rotation in two steps, on one volume or on several (--direct only)")
    stage = verbs.add(
        "stage",
        _stage,
        "put a new key beside the current one: both open, until you finish or abort",
        "luksrotctl --direct stage /dev/sda2 /dev/sdb2 --key-file backup.key --generate --output next.key",
        check=_check_stage,
    )
    stage.description = f"{stage.description}\n\n{_SET_HELP}"
    _add_devices(stage)
    add_credential(stage, "key that unlocks the volumes: any of their keys")
    add_new_secret(stage)
    add_engine(stage)
    waiting = stage.add_argument_group("until it is finished or aborted")
    expires = f"when it is reported as forgotten: 45m, 12h, 30d, 6w or never (default: {_EXPIRES})"
    waiting.add_argument("--expires", metavar="TIME", default=_EXPIRES, help=expires)
    keep = "several volumes: if it fails on one, keep it staged on the others, to go on with the same key later"
    waiting.add_argument("--keep", action="store_true", help=keep)
    ends = (
        ("finish", "make the staged key the only one; the old one opens nothing any more"),
        ("confirm", "the same as finish"),
        ("abort", "take the staged key back"),
    )
    for name, summary in ends:
        verb = verbs.add(name, _end, summary, f"luksrotctl --direct {name} /dev/sda2 /dev/sdb2", check=_check_end)
        _add_devices(verb)
        verb.add_argument("--generation", type=int, metavar="N", help="only if generation N is the staged one")
        alone = "this volume only, without the others of its set (if they are lost, say)"
        verb.add_argument("--alone", action="store_true", help=alone)
        add_engine(verb)
    status = verbs.add(
        "status",
        _status,
        "tell where a rotation in two steps stands, and what can be done",
        "luksrotctl --direct status /dev/sda2 /dev/sdb2",
        writes=False,
        check=_check_header,
    )
    _add_devices(status)


def _add_devices(parser: argparse.ArgumentParser) -> None:
    add_device(parser, "+")
    add_name(parser)
    group = "id of the set of volumes; without it, the one that is staged on them"
    parser.add_argument("--set", metavar="ID", help=group)


def _check_header(options: argparse.Namespace) -> None:
    if options.header is not None and len(options.devices) != 1:
        raise InvalidRequest("cannot use --header: it takes exactly one device")


def _check_stage(options: argparse.Namespace) -> None:
    _check_header(options)
    check_new_secret(options)
    check_engine(options)
    duration(options.expires)


def _check_end(options: argparse.Namespace) -> None:
    _check_header(options)
    check_engine(options)
    if len(options.devices) > 1 and (options.generation is not None or options.alone):
        raise InvalidRequest("cannot use --generation and --alone with several devices: they take exactly one")
    if options.alone and options.set is not None:
        raise InvalidRequest("cannot use --alone and --set together")


def _stage(options: argparse.Namespace) -> Report:
    device = None if options.set else only(options)
    with key_request(options) as request:
        if device is None:
            return _stage_set(options, request)
        done = call(lambda local, progress: _staged(local, device, request, options, progress), options.engine)
        return changed("stage", device.name, done, options.output, to_stderr=prints_key(options))


async def _staged(
    local: "Local", device: Device, request: KeyRequest, options: argparse.Namespace, progress: Progress
) -> KeyChange:
    from luksrotd import direct  # noqa: PLC0415 - not before --direct is known to be meant
    from luksrotd.ctl.local import changed_key, ref_of  # noqa: PLC0415 - as above

    async with local.prepared(request) as (sources, pbkdf, deliver):
        return changed_key(
            await local.volumes.stage(
                ref_of(device),
                sources,
                data=request.data,
                pbkdf=pbkdf,
                name=request.name,
                hold=direct.Hold(duration(options.expires)),
                progress=progress,
                deliver=deliver,
            )
        )


def _stage_set(options: argparse.Namespace, request: KeyRequest) -> Report:
    from luksrotd import direct  # noqa: PLC0415 - not before --direct is known to be meant

    async def work(local: "Local", progress: Progress) -> Report:
        async with local.prepared(request) as (sources, pbkdf, deliver):
            wanted = direct.SetRequest(
                request.data, pbkdf, request.name, options.set, duration(options.expires), options.keep
            )
            done = await direct.sets().stage(_refs(options), sources, wanted, progress=progress, deliver=deliver)
        useless = done.state == "unstaged"
        if useless and not isinstance(request.new, int):
            request.new.forget()
        output = None if useless else options.output
        return set_changed("stage", options.devices, done, output, to_stderr=prints_key(options))

    return call(work)


def _end(options: argparse.Namespace) -> Report:
    verb = "abort" if options.verb == "abort" else "finish"
    device = None if options.set else only(options)

    async def alone(local: "Local", progress: Progress, device: Device) -> Report:
        from luksrotd.ctl.local import changed_key, ref_of  # noqa: PLC0415 - not before --direct is known to be meant

        ref = ref_of(device)
        use = local.volumes.abort if verb == "abort" else local.volumes.finish
        group = await _set_of(local, ref, options.name) if options.alone else None
        done = await use(ref, name=options.name, generation=options.generation, group=group, progress=progress)
        return changed(verb, device.name, changed_key(done), None, to_stderr=False)

    async def together(_: "Local", progress: Progress) -> Report:
        from luksrotd import direct  # noqa: PLC0415 - as above

        sets = direct.sets()
        use = sets.abort if verb == "abort" else sets.finish
        done = await use(_refs(options), name=options.name, group=options.set, progress=progress)
        return set_changed(verb, options.devices, done, None, to_stderr=False)

    work = together if device is None else lambda local, progress: alone(local, progress, device)
    return call(work, options.engine)


async def _set_of(local: "Local", ref: "DeviceRef", name: str) -> str | None:
    staged = [key.token for key in (await local.volumes.look(ref)).named(name) if key.token.state == "staged"]
    return staged[0].group.id if len(staged) == 1 and staged[0].group else None


def _status(options: argparse.Namespace) -> Report:
    from luksrotd import direct  # noqa: PLC0415 - not before --direct is known to be meant

    async def work(_: "Local", progress: Progress) -> Report:
        found = await direct.sets().status(_refs(options), name=options.name, group=options.set)
        return set_status(options.devices, found)

    return call(work)


def _refs(options: argparse.Namespace) -> "Sequence[DeviceRef]":
    from luksrotd.ctl.local import ref_of  # noqa: PLC0415 - not before --direct is known to be meant

    return [ref_of(Device(name, options.header)) for name in options.devices]
