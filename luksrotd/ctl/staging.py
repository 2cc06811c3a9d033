# SPDX-License-Identifier: GPL-2.0-or-later
"""Rotation in two steps, on one volume or on a set of them: stage, then finish or abort."""

import argparse
from dataclasses import replace
from typing import Final

from luksrotd.ctl.arguments import (
    Verbs,
    add_credential,
    add_device,
    add_engine,
    add_if_generation,
    add_name,
    add_new_secret,
    add_token,
    check_engine,
    check_new_secret,
)
from luksrotd.ctl.backend import call, change
from luksrotd.ctl.model import Backend, KeyRequest
from luksrotd.ctl.newkey import change_key
from luksrotd.ctl.progress import shown
from luksrotd.ctl.report import Report
from luksrotd.ctl.request import devices, key_request, prints_key, seconds
from luksrotd.ctl.setreport import set_changed, set_status
from luksrotd.errors import InvalidRequest

_SET_HELP: Final = """\
Several volumes are a set that gets the same key: it is staged on all of them, or else on none, and it can be
finished only when it is staged on all.  After an interruption, stage again with the same key: what is staged
already is left as it is."""


def add(verbs: Verbs) -> None:
    """The verbs."""
    verbs.group("rotation in two steps, on one volume or on several")
    stage = verbs.add(
        "stage",
        _stage,
        "put a new key beside the current one: both open, until you finish or abort",
        "luksrotctl stage /dev/sda2 /dev/sdb2 --key-file backup.key --generate --output next.key",
        check=_check_stage,
        bus=True,
    )
    stage.description = f"{stage.description}\n\n{_SET_HELP}"
    _add_devices(stage)
    add_credential(stage, "key that unlocks the volumes: any of their keys")
    add_token(stage)
    add_new_secret(stage)
    add_if_generation(stage)
    add_engine(stage)
    waiting = stage.add_argument_group("until it is finished or aborted")
    expires = "when it is reported as forgotten: 45m, 12h, 30d, 6w or never (default: as configured, or else 30d)"
    waiting.add_argument("--expires", metavar="TIME", help=expires)
    keep = "several volumes: if it fails on one, keep it staged on the others, to go on with the same key later"
    waiting.add_argument("--keep", action="store_true", help=keep)
    ends = (
        ("finish", "make the staged key the only one; the old one opens nothing any more"),
        ("confirm", "the same as finish"),
        ("abort", "take the staged key back"),
    )
    for name, summary in ends:
        verb = verbs.add(name, _end, summary, f"luksrotctl {name} /dev/sda2 /dev/sdb2", check=_check_end, bus=True)
        _add_devices(verb)
        verb.add_argument("--generation", type=int, metavar="N", help="only if generation N is the staged one")
        alone = "this volume only, without the others of its set (if they are lost, say)"
        verb.add_argument("--alone", action="store_true", help=alone)
        add_if_generation(verb)
        add_engine(verb)
    status = verbs.add(
        "status",
        _status,
        "tell where a rotation in two steps stands, and what can be done",
        "luksrotctl status /dev/sda2 /dev/sdb2",
        writes=False,
        check=_check_header,
        bus=True,
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


def _check_one(options: argparse.Namespace) -> None:
    _check_header(options)
    if options.if_generation is not None and not _is_alone(options):
        raise InvalidRequest("cannot use --if-generation with a set of devices: it takes exactly one")


def _check_stage(options: argparse.Namespace) -> None:
    _check_one(options)
    check_new_secret(options)
    check_engine(options)
    if options.expires is not None:
        seconds(options.expires)


def _check_end(options: argparse.Namespace) -> None:
    _check_one(options)
    check_engine(options)
    if len(options.devices) > 1 and (options.generation is not None or options.alone):
        raise InvalidRequest("cannot use --generation and --alone with several devices: they take exactly one")
    if options.alone and options.set is not None:
        raise InvalidRequest("cannot use --alone and --set together")


def _stage(options: argparse.Namespace) -> Report:
    expires = None if options.expires is None else seconds(options.expires)
    more = {"expires": expires, "set": options.set, "keep": options.keep}
    if _is_alone(options):
        return change_key(options, **more)
    with key_request(options) as request:
        return _change_set(options, replace(request, **more))


def _end(options: argparse.Namespace) -> Report:
    verb = "abort" if options.verb == "abort" else "finish"
    request = KeyRequest(verb, options.name, generation=options.generation, alone=options.alone, set=options.set)
    return change(options, request) if _is_alone(options) else _change_set(options, request)


def _is_alone(options: argparse.Namespace) -> bool:
    return len(options.devices) == 1 and options.set is None


def _change_set(options: argparse.Namespace, request: KeyRequest) -> Report:
    async def work(backend: Backend) -> Report:
        with shown() as progress:
            done = await backend.change_set(devices(options), request, progress)
        useless = request.verb == "stage" and done.state == "unstaged"
        if useless and request.new is not None and not isinstance(request.new, int):
            request.new.forget()
        output = None if useless else getattr(options, "output", None)
        return set_changed(request.verb, options.devices, done, output, to_stderr=prints_key(options))

    return call(options, work)


def _status(options: argparse.Namespace) -> Report:
    async def work(backend: Backend) -> Report:
        return set_status(options.devices, await backend.set_status(devices(options), options.name, options.set))

    return call(options, work)
