# SPDX-License-Identifier: GPL-2.0-or-later
"""A new key by enroll, rotate or stage: perhaps only when it is due, and only when the escrow has it."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from luksrotd.ctl import escrow
from luksrotd.ctl.age import NotDue, not_due
from luksrotd.ctl.backend import call, change
from luksrotd.ctl.interrupt import raise_on_signals
from luksrotd.ctl.model import Backend, KeyRequest, Planned, Volume
from luksrotd.ctl.report import Report, left_alone
from luksrotd.ctl.request import device, key_request, prints_key, seconds
from luksrotd.errors import LuksrotdError, NeedsReconcile, Outcome, StaleGeneration


@dataclass(frozen=True, slots=True)
class _Seen:
    """The volume for which all is decided: if its header is another one when it comes to it, nothing is done."""

    seqid: int
    facts: Mapping[str, str]


def change_key(options: argparse.Namespace, **more: Any) -> Report:
    """Do what the options say; ``more``: members of the request.  Raises ``LuksrotdError``."""
    command = None if options.escrow is None else escrow.checked(options.escrow)
    older_than = getattr(options, "older_than", None)
    if command is None and older_than is None:
        with key_request(options) as request:
            return change(options, replace(request, **more))
    seen = _look(options, None if older_than is None else seconds(older_than, "--older-than"))
    if isinstance(seen, NotDue):
        return left_alone(device(options).name, seen, to_stderr=prints_key(options))
    with key_request(options) as request:
        request = replace(request, if_generation=seen.seqid, **more)
        return change(options, request) if command is None else _in_escrow(options, command, request, seen)


def _look(options: argparse.Namespace, age: int | None) -> _Seen | NotDue:
    """Decide, before any secret is asked for."""
    found = call(options, lambda backend: _decide(backend, options, age))
    raise_on_signals()  # there is something to be interrupted again
    return found


async def _decide(backend: Backend, options: argparse.Namespace, age: int | None) -> _Seen | NotDue:
    volume = await backend.volume(device(options), data=False)
    if young := _young(volume, options.name, age):
        return young
    planned = await _planned(backend, options)
    if planned.seqid != volume.seqid:  # of the repair, or somebody else was here
        volume = await backend.volume(device(options), data=False)
        _check_unchanged(planned.seqid, volume.seqid)
        if young := _young(volume, options.name, age):
            return young
    if options.if_generation is not None:
        _check_unchanged(options.if_generation, volume.seqid)
    facts = {"VERB": options.verb, "UUID": volume.uuid, "DEVICE": volume.device, "NAME": options.name}
    facts["GENERATION"] = str(planned.generation)
    return _Seen(volume.seqid, {f"LUKSROTD_{fact}": value for fact, value in facts.items()})


def _young(volume: Volume, name: str, age: int | None) -> NotDue | None:
    return None if age is None else not_due(volume, name, age, datetime.now(UTC))


async def _planned(backend: Backend, options: argparse.Namespace) -> Planned:
    """What the verb would do; what a crash has left is finished first, as the verb itself would."""
    try:
        return await backend.plan(device(options), options.verb, options.name)
    except NeedsReconcile:
        await backend.reconcile(device(options), dry_run=False)
    return await backend.plan(device(options), options.verb, options.name)


def _check_unchanged(seen: int, now: int) -> None:
    if seen != now:
        raise StaleGeneration(f"cannot go on: the header is at sequence number {now}, not {seen}")


#: What the key that an escrow has got is worth after an error with this outcome; after all others it opens the volume.
_THEN: Final = {
    Outcome.UNCHANGED: "opens nothing",
    Outcome.UNKNOWN: "may open the volume: keep it, and the old one",
}


def _in_escrow(options: argparse.Namespace, command: str, request: KeyRequest, seen: _Seen) -> Report:
    """Give the key away, and then do what makes it open the volume."""
    assert isinstance(request.new, int)  # noqa: S101 -- for mypy: a key that has been made here
    data = escrow.give(command, request.new, seen.facts, options.escrow_timeout)
    try:
        done = change(options, request if data is None else replace(request, data=data))
    except LuksrotdError as error:
        it = _THEN.get(error.outcome, "opens the volume")
        raise type(error)(f"{error.message}; the key that {command} has got {it}", outcome=error.outcome) from error
    text = [*done.text, f"{command} has got the new key"]
    return replace(done, document={**done.document, "escrow": command}, text=text)
