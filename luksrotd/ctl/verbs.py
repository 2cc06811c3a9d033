# SPDX-License-Identifier: GPL-2.0-or-later
"""The verbs that everybody needs first: options → calls of the backend → a report."""

import argparse
from collections.abc import Awaitable
from typing import Final, TypeVar

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
from luksrotd.ctl.backend import call
from luksrotd.ctl.exits import Exit, status_of, worst
from luksrotd.ctl.model import Backend, Device, Reconciled
from luksrotd.ctl.newkey import change_key
from luksrotd.ctl.report import Failed, Report, lines_of, listed, reconciled, showed, verified
from luksrotd.ctl.request import credential, device, seconds
from luksrotd.errors import Cancelled, InvalidRequest, LuksrotdError

#: What ``add`` adds.
NAMES: Final = ("list", "show", "reconcile", "enroll", "rotate", "verify")

T = TypeVar("T")


def add(verbs: Verbs) -> None:
    """The verbs."""
    verbs.group("volumes")
    verbs.add(
        "list", _list, "list the LUKS2 volumes and their managed keys", "luksrotctl list --json", writes=False, bus=True
    )
    show = "show everything about one volume, but no secret"
    add_device(verbs.add("show", _show, show, "luksrotctl show /dev/sda2", writes=False, bus=True))
    reconcile = verbs.add(
        "reconcile",
        _reconcile,
        "finish what a crash has interrupted; needs no key",
        "luksrotctl reconcile --all --dry-run",
        check=_check_reconcile,
        bus=True,
    )
    add_device(reconcile, "*")
    reconcile.add_argument("--all", action="store_true", help="all volumes; goes on when one fails")
    reconcile.add_argument("--dry-run", action="store_true", help="change nothing, only tell what would be done")
    expired = "abort staged keys that have expired, too"
    reconcile.add_argument("--retire-expired", action="store_true", help=expired)
    verbs.group("managed keys")
    enroll = "luksrotctl enroll /dev/sda2 --generate --output backup.key --data @escrow.json"
    rotate = "luksrotctl rotate /dev/sda2 --key-file backup.key --new-keyfile next.key"
    given = "give a volume a managed key"
    enrolled = verbs.add("enroll", change_key, given, enroll, check=_check_change, bus=True)
    replaced = "replace a managed key by a new one; the old one opens nothing any more"
    rotated = verbs.add("rotate", change_key, replaced, rotate, check=_check_rotate, bus=True)
    age = "only if the key is older: 45m, 12h, 90d, 6w; else nothing is done"
    rotated.add_argument("--older-than", metavar="AGE", help=age)
    for verb in (enrolled, rotated):
        add_device(verb)
        add_name(verb)
        add_credential(verb, "key that unlocks the volume: any of its keys")
        add_token(verb)
        add_new_secret(verb)
        add_if_generation(verb)
        add_engine(verb)
    verify = verbs.add(
        "verify",
        _verify,
        "tell whether a key is the managed key; changes nothing",
        "luksrotctl verify /dev/sda2 --key-file backup.key",
        writes=False,
        bus=True,
    )
    add_device(verify)
    add_name(verify)
    add_credential(verify, "key to be checked")
    add_token(verify)


def _check_change(options: argparse.Namespace) -> None:
    check_new_secret(options)
    check_engine(options)


def _check_rotate(options: argparse.Namespace) -> None:
    _check_change(options)
    if options.older_than is not None:
        seconds(options.older_than, "--older-than")


def _check_reconcile(options: argparse.Namespace) -> None:
    if options.all == bool(options.devices):
        raise InvalidRequest("cannot reconcile: name devices or give --all, one of both")
    if options.header is not None and len(options.devices) != 1:
        raise InvalidRequest("cannot use --header: it takes exactly one device")


def _list(options: argparse.Namespace) -> Report:
    async def work(backend: Backend) -> Report:
        found = await backend.devices()
        return listed([(one.name, await _tried(backend.volume(one, data=False))) for one in found])

    return call(options, work)


def _show(options: argparse.Namespace) -> Report:
    async def work(backend: Backend) -> Report:
        return showed(await backend.volume(device(options), data=True))

    return call(options, work)


def _verify(options: argparse.Namespace) -> Report:
    with credential(options, f"Key {options.name} of {options.device}") as shown:

        async def work(backend: Backend) -> Report:
            matches = await backend.verify(device(options), options.name, shown)
            return verified(options.device, options.name, matches=matches)

        return call(options, work)


def _reconcile(options: argparse.Namespace) -> Report:
    from luksrotd.ctl.sidebyside import side_by_side  # noqa: PLC0415 - imports asyncio

    async def work(backend: Backend) -> Report:
        async def one(device: Device) -> Reconciled | Failed:
            result = await _tried(
                backend.reconcile(device, dry_run=options.dry_run, retire_expired=options.retire_expired)
            )
            if isinstance(result, Failed) and (len(options.devices) == 1 or isinstance(result.error, Cancelled)):
                raise result.error
            return result

        devices = await backend.devices() if options.all else [_named(name, options) for name in options.devices]
        names = [device.name for device in devices]
        found: list[Reconciled | Failed]
        if options.direct:
            stopped = Failed(Cancelled("cannot go on: the operation was interrupted"))
            found = await side_by_side(names, lambda name: one(_named(name, options)), lines_of, interrupted=stopped)
        else:
            found = [await one(device) for device in devices]
        results = list(zip(names, found, strict=True))
        return reconciled(results, worst(_status(result) for result in found), dry_run=options.dry_run)

    return call(options, work)


def _named(name: str, options: argparse.Namespace) -> Device:
    return Device(name, options.header)


def _status(result: Reconciled | Failed) -> Exit:
    if isinstance(result, Failed):
        return status_of(result.error)
    return Exit.PERSON if any(finding.action == "person" for finding in result.left) else Exit.DONE


async def _tried(call: Awaitable[T]) -> T | Failed:
    """The result, or the error that must not keep the others from their turn."""
    try:
        return await call
    except LuksrotdError as error:
        return Failed(error)
