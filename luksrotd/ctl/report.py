# SPDX-License-Identifier: GPL-2.0-or-later
"""What luksrotctl has to tell, as a JSON document and as text: the schemas are in luksrotctl(1), "JSON"."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from typing import Any, Final

from luksrotd import names
from luksrotd.ctl import differences
from luksrotd.ctl.age import NotDue
from luksrotd.ctl.exits import Exit, status_of
from luksrotd.ctl.model import Finding, Key, KeyChange, Reconciled, Volume
from luksrotd.errors import LuksrotdError, Outcome
from luksrotd.records import dataclass

#: What reconcile does about a finding (``rotation.reconcile.Code``): the finding itself names tokens and ranges.
_REPAIRS: Final[Mapping[str, str]] = {
    "header-copy-bad": "write this copy again from the other one",
    "header-copies-differ": "write the copy with the lower sequence number again from the other one",
    "wipe-pending": "overwrite these ranges, where no keyslot has come meanwhile, and clear the record of them",
    "token-without-keyslot": "remove the token",
    "key-superseded": "remove its keyslot and its token, and overwrite its area",
    "key-retired": "remove what is left of it, and overwrite its area",
    "key-unborn": "remove the token",
    "key-unsettled": "complete its token",
    "staged-expired": "abort it: remove its keyslot and its token, and overwrite its area",
}


_NOW: Final = "generation {generation} in keyslot {keyslot}"
#: What a verb has done.
_CHANGED: Final[Mapping[str, str]] = {
    "enroll": f"enrolled key {{name}} of {{device}}: {_NOW}",
    "rotate": f"rotated key {{name}} of {{device}}: {_NOW}",
    "stage": f"staged key {{name}} of {{device}}: {_NOW}, beside the current one; finish or abort it",
    "finish": f"finished the rotation of key {{name}} of {{device}}: {_NOW}",
    "abort": f"aborted the rotation of key {{name}} of {{device}}: {_NOW} stays",
    "remove": "removed key {name} of {device}",
    "set-data": f"changed the associated data of key {{name}} of {{device}}: {_NOW}",
    "adopt": "adopted keyslot {keyslot} of {device} as key {name}",
    "release": "released key {name} of {device}; its keyslot stays",
    "recreate": f"recreated key {{name}} of {{device}}: {_NOW}",
}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Failed:
    """An operation on one of several devices that failed."""

    error: LuksrotdError


@dataclass(frozen=True, slots=True)
class Report:
    """The end of a verb; ``text`` are lines and tables.  ``read_only``: nothing was to be changed.

    ``to_stderr``: standard output is for a key.
    """

    status: Exit
    document: Mapping[str, Any]
    text: Sequence[str | Table] = field(default=())
    read_only: bool = False
    to_stderr: bool = False


def failed(error: LuksrotdError) -> Report:
    """The report of an error that ended the verb."""
    return Report(status_of(error), failure(error), [f"luksrotctl: {told(error)}"], to_stderr=True)


def told(error: LuksrotdError) -> str:
    """The message, and what is true of the device if that is not what one would expect of a failure."""
    consequence = {
        Outcome.UNCHANGED: "",
        Outcome.COMMITTED: " (the change was made)",
        Outcome.WIPE_PENDING: " (the change was made, but the old key is not wiped yet: run luksrotctl reconcile)",
        Outcome.UNKNOWN: " (what the device holds now is not known: run luksrotctl reconcile)",
    }
    return f"{error.message}{consequence[error.outcome]}"


def listed(found: Sequence[tuple[str, Volume | Failed]]) -> Report:
    """The report of ``list``: one that cannot be read is listed with its error."""
    volumes: list[Mapping[str, Any]] = []
    rows: list[Sequence[str]] = []
    for device, result in found:
        if isinstance(result, Failed):
            volumes.append({"device": device, **failure(result.error)})
            rows.append([device, "-", "-", "-", told(result.error)])
        else:
            volumes.append(_volume(result))
            keys = ", ".join(f"{key.name} ({key.generation})" for key in result.keys) or "-"
            problems = sum(finding.action != "note" for finding in result.problems)
            state = "busy" if result.busy else f"{problems} problems" if problems else "ok"
            rows.append([result.device, result.uuid, result.label or "-", keys, state])
    table = Table(("DEVICE", "UUID", "LABEL", "KEYS (GENERATION)", "STATE"), rows)
    return Report(Exit.DONE, {"volumes": volumes}, [table] if rows else ["no LUKS2 volumes"], read_only=True)


def showed(volume: Volume) -> Report:
    """The report of ``show``."""
    text: list[str | Table] = [
        f"device: {volume.device}",
        f"UUID: {volume.uuid}",
        f"label: {volume.label or '-'}",
        f"sequence number: {volume.seqid}",
        f"ordinary keyslots: {_numbers(volume.ordinary_keyslots)}",
        f"other tokens: {', '.join(f'{number} ({kind})' for number, kind in _foreign(volume).items()) or '-'}",
    ]
    if volume.busy:
        text.append("busy: a job runs or waits")
    if volume.keys:
        headings = ("KEY", "GENERATION", "STATE", "KEYSLOT", "TOKEN", "ROTATED AT", "DATA")
        text += ["", Table(headings, [_key_row(key) for key in volume.keys])]
    else:
        text += ["", "no managed keys; see luksrotctl enroll --help"]
    if volume.problems:
        rows = [(finding.code, finding.message, _remedy(finding)) for finding in volume.problems]
        text += ["", Table(("PROBLEM", "WHAT", "RECONCILE WOULD"), rows)]
    return Report(Exit.DONE, _volume(volume), text, read_only=True)


def changed(verb: str, device: str, change: KeyChange, output: str | None, *, to_stderr: bool) -> Report:
    """The report of a verb that changes one key of one volume."""
    text = [_CHANGED[verb].format(device=device, **asdict(change))]
    document = {"device": device, **asdict(change), "outcome": str(Outcome.COMMITTED)}
    if output is not None:
        text.append(f"the new key is in {output}")
        document["output"] = output
    return Report(Exit.DONE, document, text, to_stderr=to_stderr)


def left_alone(device: str, found: NotDue, *, to_stderr: bool) -> Report:
    """The report of ``rotate --older-than`` where there is nothing to be done yet."""
    key = found.key
    document = {"device": device, "name": key.name, "generation": key.generation, "keyslot": key.keyslot}
    document |= {"rotated_at": key.rotated_at, "due_at": found.due_at, "outcome": str(Outcome.UNCHANGED)}
    text = [f"key {key.name} of {device} is not due: rotated at {key.rotated_at}, due at {found.due_at}"]
    if found.warning:
        document["warning"] = found.warning
        text.append(f"warning: {found.warning}")
    return Report(Exit.DONE, document, text, to_stderr=to_stderr)


def verified(device: str, name: str, *, matches: bool) -> Report:
    """The report of ``verify``."""
    text = f"this {'is' if matches else 'is not'} key {name} of {device}"
    document = {"device": device, "name": name, "matches": matches}
    return Report(Exit.DONE if matches else Exit.FAILED, document, [text], read_only=True)


def reconciled(results: Sequence[tuple[str, Reconciled | Failed]], status: Exit, *, dry_run: bool) -> Report:
    """The report of ``reconcile``."""
    volumes: list[Mapping[str, Any]] = []
    text: list[str | Table] = []
    for device, result in results:
        if isinstance(result, Failed):
            volumes.append({"device": device, **failure(result.error)})
            text.append(f"{device}: {told(result.error)}")
            continue
        sets = {"found": result.found, "repaired": result.repaired, "left": result.left}
        document: dict[str, Any] = {"device": device}
        document |= {name: [_finding(one) for one in found] for name, found in sets.items()}
        if result.differences is not None:
            document["differences"] = [asdict(one) for one in result.differences]
        volumes.append(document)
        text.extend(_reconciled_lines(device, result, dry_run=dry_run))
    return Report(status, {"dry_run": dry_run, "volumes": volumes}, text or ["no LUKS2 volumes"])


def lines_of(device: str, result: Reconciled | Failed) -> Sequence[str]:
    """What there is to say of one volume that was reconciled."""
    if isinstance(result, Failed):
        return [f"{device}: {told(result.error)}"]
    return _reconciled_lines(device, result, dry_run=False)


def _reconciled_lines(device: str, result: Reconciled, *, dry_run: bool) -> Sequence[str]:
    if not result.found:
        return [f"{device}: clean"]
    lines = [f"{device}: repaired: {finding.message}" for finding in result.repaired]
    for finding in result.left:
        if finding.action == "person":
            lines.append(f"{device}: needs a person: {finding.message}")
        elif finding.action == "note":
            lines.append(f"{device}: note: {finding.message}")
        elif dry_run:
            lines.append(f"{device}: {finding.message}; would {_remedy(finding)}")
        else:
            lines.append(f"{device}: left: {finding.message}")
    if dry_run:
        lines += [f"{device}: difference: {line}" for line in differences.lines(result.differences or ())]
    return lines


def _remedy(finding: Finding) -> str:
    if finding.action == "person":
        return "leave it alone: a person must decide"
    if finding.action == "note":
        return "do nothing: it is a note"
    return _REPAIRS.get(finding.code, "repair it")


def _key_row(key: Key) -> Sequence[str]:
    marks = [mark for mark, set_ in (("wipe pending", key.wipe_pending), ("changed", key.changed)) if set_]
    if key.expires_at:
        marks.append(f"until {key.expires_at}")
    if key.set:
        marks.append(f"set {key.set} of {key.set_size}")
    state = ", ".join([key.state, *marks])
    keyslot = "-" if key.keyslot is None else str(key.keyslot)
    data = "-" if key.data is None else json.dumps(key.data, ensure_ascii=False)
    return (key.name, str(key.generation), state, keyslot, str(key.token), key.rotated_at or "-", data)


def _volume(volume: Volume) -> Mapping[str, Any]:
    document = asdict(volume)
    document["tokens"] = {str(number): kind for number, kind in volume.tokens.items()}
    document["problems"] = [_finding(one) for one in volume.problems]
    return document


def _finding(finding: Finding) -> Mapping[str, Any]:
    """Without what nobody can tell."""
    return {member: value for member, value in asdict(finding).items() if value is not None}


def failure(error: LuksrotdError) -> Mapping[str, str]:
    """An error in JSON."""
    return {"error": error.code, "message": error.message, "outcome": str(error.outcome)}


def _foreign(volume: Volume) -> Mapping[int, str]:
    return {number: kind for number, kind in volume.tokens.items() if kind != names.TOKEN_TYPE}


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "-"
