# SPDX-License-Identifier: GPL-2.0-or-later
"""The record: one journal entry for each change, whether it succeeds or fails, and for each event worth keeping.

systemd/luksrotd.catalog explains the entries, luksrotd(8) their fields.  No secret and no associated data goes in:
an error is there by its code, for its text may quote a header.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field
from enum import IntEnum
from typing import Final, TypeVar

from luksrotd.errors import Cancelled, Internal, LuksrotdError, Outcome, plain
from luksrotd.names import MessageId
from luksrotd.ports import Caller, DeviceRef, Host
from luksrotd.records import dataclass
from luksrotd.rotation.change import Change
from luksrotd.rotation.lineage import lineage
from luksrotd.rotation.protocol import Phase
from luksrotd.rotation.reconcile import Action, Finding
from luksrotd.rotation.stepwise import Steps
from luksrotd.rotation.view import DeviceView
from luksrotd.service import actor
from luksrotd.service.progress import Progress, Stage, ignore
from luksrotd.service.shown import Problem

Decided = TypeVar("Decided", bound=Change | Steps)
Fields = dict[str, str | int | None]


class Priority(IntEnum):
    """Levels of syslog(3)."""

    ERROR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6


@dataclass(frozen=True, slots=True)
class Verb:
    """What is done to a volume: its kind, as in ``jobs.Kind`` where it can be a job, and the entry when it is done."""

    kind: str
    message_id: MessageId
    done: str


ENROLL: Final = Verb("enroll", MessageId.ENROLLED, "key enrolled")
ROTATE: Final = Verb("rotate", MessageId.ROTATED, "key rotated")
STAGE: Final = Verb("stage", MessageId.STAGED, "key staged")
FINISH: Final = Verb("finish", MessageId.FINISHED, "staged key finished")
ABORT: Final = Verb("abort", MessageId.ABORTED, "staged key aborted")
REMOVE: Final = Verb("remove", MessageId.REMOVED, "key removed")
SET_DATA: Final = Verb("set-data", MessageId.DATA_CHANGED, "associated data changed")
ADOPT: Final = Verb("adopt", MessageId.ADOPTED, "keyslot adopted")
RELEASE: Final = Verb("release", MessageId.RELEASED, "key released")
RECREATE: Final = Verb("recreate", MessageId.RECREATED, "key recreated")
SCRUB: Final = Verb("scrub", MessageId.SCRUBBED, "keyslot space scrubbed")
TRANSACTION: Final = Verb("transaction", MessageId.TRANSACTION, "transaction committed")
BACKUP: Final = Verb("backup", MessageId.BACKED_UP, "header backed up")
RESTORE: Final = Verb("restore", MessageId.RESTORED, "header restored")
ACCEPT: Final = Verb("accept", MessageId.KEYSLOT_ACCEPTED, "keyslot accepted")
REMOVE_KEYSLOT: Final = Verb("remove-keyslot", MessageId.KEYSLOT_REMOVED, "keyslot removed")
RECONCILE: Final = Verb("reconcile", MessageId.RECONCILED, "volume reconciled")


@dataclass(slots=True)
class Account:
    """What becomes of one change, as far as it is known; ``fields`` are added to its entry."""

    verb: Verb
    ref: DeviceRef
    key: str = ""
    fields: Fields = field(default_factory=dict)
    view: DeviceView | None = None
    change: Change | None = None
    phase: Stage | Phase | None = None

    def following(self, decide: Callable[[DeviceView], Decided]) -> Callable[[DeviceView], Decided]:
        """``decide``, seen through: on which header it decides what."""

        def followed(seen: DeviceView) -> Decided:
            self.view = seen
            decided = decide(seen)
            self.change = decided if isinstance(decided, Change) else decided.change
            return decided

        return followed

    def progress(self, then: Progress = ignore) -> Progress:
        """A ``Progress`` that remembers how far it went, and tells ``then``."""

        def entered(step: Stage | Phase) -> None:
            self.phase = step
            then(step)

        return entered

    def done(self, uuid: str, **fields: str | int | None) -> None:
        """It has succeeded, on this volume."""
        self.fields |= {"uuid": uuid, **fields}

    @property
    def committing(self) -> bool:
        """Whether the header may have been written."""
        return isinstance(self.phase, Phase) and self.phase is not Phase.NEW_AREA

    def about(self) -> Fields:
        """The volume and the key, as they were before."""
        seen = self.view
        about: Fields = {"kind": self.verb.kind, "node": self.ref.path, "header": self.ref.header}
        about |= {"uuid": self.ref.uuid if seen is None else seen.uuid, "key": self.key or None}
        about["phase"] = self.phase
        if seen is not None:
            about |= {"seqid_before": seen.seqid, "keyslots_before": _numbers(seen.metadata.keyslots)}
            if self.key:
                current = lineage(seen, self.key).current
                about["generation_before"] = current.token.generation if current else 0
        return about

    def keyslots(self) -> Fields:
        """The keyslots that the change adds, removes and leaves."""
        if self.view is None or self.change is None:
            return {}
        change, before = self.change, set(self.view.metadata.keyslots)
        base = before if change.start is None else set(change.start.metadata.keyslots)
        after = base - set(change.destroyed) | {edit.keyslot for edit in change.added}
        return {
            "keyslots_added": _numbers(after - before) or None,
            "keyslots_removed": _numbers(before - after) or None,
            "keyslots_after": _numbers(after),
        }


class Audit:
    """Writes the record into the journal of ``host``."""

    def __init__(self, host: Host) -> None:
        self._journal = host.journal
        self._myself = host.myself

    @contextmanager
    def change(self, verb: Verb, ref: DeviceRef, key: str = "", **fields: str | int | None) -> Iterator[Account]:
        """One change: its one entry is written when the block is left, however that is."""
        with self.attempt(verb, ref, key, **fields) as account:
            yield account
        done: Fields = {**account.about(), **account.keyslots(), **account.fields, "outcome": Outcome.COMMITTED}
        self._record(verb.message_id, verb.done, Priority.NOTICE, done)

    @contextmanager
    def attempt(self, verb: Verb, ref: DeviceRef, key: str = "", **fields: str | int | None) -> Iterator[Account]:
        """The same for what is recorded otherwise when it succeeds."""
        account = Account(verb, ref, key, fields)
        try:
            yield account
        except BaseException as error:
            self._failed(account, error)
            raise

    def _failed(self, account: Account, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            code, outcome = Cancelled.code, Outcome.UNCHANGED
        elif isinstance(error, LuksrotdError):
            code, outcome = error.code, error.outcome
        else:
            code, outcome = Internal.code, Outcome.UNKNOWN if account.committing else Outcome.UNCHANGED
        about = account.about()
        if outcome is Outcome.UNCHANGED:
            for name in ("seqid", "keyslots", "generation"):
                after = "generation" if name == "generation" else f"{name}_after"
                about[after] = about.get(f"{name}_before")
        about["phase"] = account.phase or "opening"
        ended: Fields = {"outcome": outcome, "error": code}
        unchanged = outcome is Outcome.UNCHANGED
        self._record(
            MessageId.FAILED if unchanged else MessageId.INTERRUPTED,
            f"cannot {account.verb.kind}: {code}" + ("" if unchanged else f" ({outcome})"),
            Priority.WARNING if unchanged else Priority.ERROR,
            {**about, **account.fields, **ended},
        )

    def reconciled(self, ref: DeviceRef, before: DeviceView, after: DeviceView, repaired: Sequence[Finding]) -> None:
        """What a crash had left has been mended."""
        account = Account(RECONCILE, ref, view=before)
        ended: Fields = {
            "codes": _codes(repaired),
            "keyslots_after": _numbers(after.metadata.keyslots),
            "seqid_after": after.seqid,
            "outcome": Outcome.COMMITTED,
        }
        self._record(MessageId.RECONCILED, RECONCILE.done, Priority.NOTICE, {**account.about(), **ended})

    def found(self, ref: DeviceRef, seen: DeviceView, findings: Sequence[Finding]) -> None:
        """What is left: one entry for all that a person must decide, and one for each note."""
        person = [Problem(*_problem(finding)) for finding in findings if finding.action is Action.PERSON]
        if person:
            self.needs_person(ref, seen.uuid, person)
        for note in findings:
            if note.action is Action.NOTE:
                about: Fields = {"kind": "note", "uuid": seen.uuid, "node": ref.path, "header": ref.header}
                fields: Fields = {**about, "codes": note.code, "seqid_after": seen.seqid}
                self._record(MessageId.NOTED, note.message, Priority.NOTICE, fields)

    def needs_person(self, ref: DeviceRef, uuid: str, problems: Sequence[Problem]) -> None:
        """What reconcile must not decide by itself."""
        fields: Fields = {"kind": "needs-person", "uuid": uuid, "node": ref.path, "header": ref.header}
        message = "a person must decide: " + "; ".join(problem.message for problem in problems)
        self._record(MessageId.NEEDS_PERSON, message, Priority.WARNING, {**fields, "codes": _codes(problems)})

    def foreign_change(self, uuid: str, node: str, before: int, after: int, how: str) -> None:
        """Somebody else has changed the header: sequence numbers, and ``newer``, ``older`` or ``same``."""
        fields: Fields = {"uuid": uuid, "node": node, "seqid_before": before, "seqid_after": after, "how": how}
        message = "another tool has changed the header"
        self._record(MessageId.FOREIGN_CHANGE, message, Priority.NOTICE, {"kind": "foreign-change", **fields})

    def denied(self, caller: Caller, action: str, details: Fields, unrecorded: int = 0) -> None:
        """A caller may not do what he asked for; ``unrecorded``: how often that was not recorded before."""
        fields: Fields = {"action": action, "unrecorded": unrecorded or None, **details}
        with actor.acting(caller):
            self._record(MessageId.DENIED, f"not authorized: {action}", Priority.NOTICE, {"kind": "denied", **fields})

    def configured(self) -> None:
        """The configuration has been read (again), and holds from now on."""
        self._record(MessageId.CONFIGURED, "configuration loaded", Priority.INFO, {"kind": "configured"})

    def misconfigured(self, reason: str) -> None:
        """The configuration is wrong, and the old one stays; ``reason`` names file and line."""
        message = f"configuration rejected: {reason}"
        self._record(MessageId.MISCONFIGURED, message, Priority.ERROR, {"kind": "misconfigured"})

    def started(self, version: str) -> None:
        """The daemon serves."""
        self._record(MessageId.STARTED, f"luksrotd {version} started", Priority.INFO, {"kind": "started"})

    def stopped(self, reason: str = "") -> None:
        """The daemon ends; ``reason``: why it cannot go on, if that is it."""
        message = "luksrotd stopped" + (f": {reason}" if reason else "")
        self._record(MessageId.STOPPED, message, Priority.ERROR if reason else Priority.INFO, {"kind": "stopped"})

    def _record(self, message_id: MessageId, message: str, priority: Priority, fields: Fields) -> None:
        acting = actor.current()
        caller = acting.caller or self._myself
        who: Fields = {"uid": caller.uid, "unit": caller.unit, "client": caller.client, "sender": caller.name}
        known = {**fields, **who, "job": acting.job or None}
        self._journal.record(
            plain(message),
            message_id=str(message_id),
            priority=int(priority),
            **{name: _value(value) for name, value in known.items() if value not in (None, "")},
        )


def _numbers(keyslots: Iterable[int]) -> str:
    """Keyslots as a field: ``0,1,7``."""
    return ",".join(str(number) for number in sorted(keyslots))


def _problem(finding: Finding) -> tuple[str, str, str]:
    return finding.code, finding.action, finding.message


def _codes(findings: Sequence[Finding | Problem]) -> str:
    return ",".join(dict.fromkeys(str(finding.code) for finding in findings))


def _value(value: str | int) -> str | int:
    """What is on a disk or comes from a caller may stand in a field: bounded, one line."""
    return plain(value) if isinstance(value, str) else value
