# SPDX-License-Identifier: GPL-2.0-or-later
"""What there is to tell of a set of volumes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from luksrotd.ctl.exits import Exit, status_of, worst
from luksrotd.ctl.model import SetChange, SetStatus
from luksrotd.ctl.report import Report, Table, failure, told

_HAPPENED: Final[Mapping[str, str]] = {
    "nothing": "nothing done",
    "already": "was so already",
    "staged": "staged",
    "finished": "finished",
    "aborted": "aborted",
    "undone": "staged, and aborted again",
    "failed": "failed",
}
#: What the caller can do next, by the state of the set.
_NEXT: Final[Mapping[str | None, str]] = {
    "unstaged": "nothing is staged on them",
    "partly-staged": "not staged on all of them: stage again with the same key to go on, or abort",
    "staged": "staged on all of them: finish, or abort",
    "finishing": "finished on some of them: finish the others; there is no way back",
    "finished": "finished on all of them",
    "mixed": "a person must decide; see luksrotctl status",
    None: "where it stands now is not known, for a volume cannot be read; see luksrotctl status",
}
#: The same of one volume that belongs to no set.
_NEXT_ALONE: Final[Mapping[str, str]] = {
    "unstaged": "nothing is staged",
    "staged": "a new generation is staged: finish, or abort",
}


def set_changed(verb: str, devices: Sequence[str], done: SetChange, output: str | None, *, to_stderr: bool) -> Report:
    """The report of ``stage``, ``finish`` and ``abort`` on several volumes."""
    volumes: list[Mapping[str, Any]] = []
    rows: list[Sequence[str]] = []
    for device, member in zip(devices, done.members, strict=True):
        change = asdict(member.change) if member.change else {}
        error = failure(member.error) if member.error else {}
        volumes.append({"device": device, "happened": member.happened, **change, **error})
        now = f"generation {member.change.generation} in keyslot {member.change.keyslot}" if member.change else "-"
        rows.append(
            (device, _HAPPENED.get(member.happened, member.happened), now, told(member.error) if member.error else "-")
        )
    document = {
        "name": done.name,
        "set": done.set,
        "set_size": done.size,
        "state": done.state,
        "volumes": volumes,
    }
    text: list[str | Table] = [
        Table(("DEVICE", "DONE", "KEY NOW", "ERROR"), rows),
        f"key {done.name}, set {done.set} of {done.size} volumes: {_NEXT.get(done.state, done.state)}",
    ]
    if output is not None:
        document["output"] = output
        text.append(f"the new key is in {output}")
    return Report(
        worst(status_of(member.error) for member in done.members if member.error), document, text, to_stderr=to_stderr
    )


def set_status(devices: Sequence[str], found: SetStatus) -> Report:
    """The report of ``status``."""
    members = list(zip(devices, found.members, strict=True))
    volumes = [
        {
            "device": device,
            "uuid": member.uuid,
            "standing": member.standing,
            "generation": member.generation,
            "keyslot": member.keyslot,
            "why": member.why,
        }
        for device, member in members
    ]
    document = {
        "name": found.name,
        "set": found.set,
        "set_size": found.size,
        "state": found.state,
        "steps": list(found.steps),
        "why": found.why,
        "volumes": volumes,
    }
    rows = [(device, one.standing, str(one.generation or "-"), one.why or "-") for device, one in members]
    what = f"set {found.set} of {found.size} volumes" if found.set else "no set"
    following = _NEXT_ALONE if len(devices) == 1 and found.set is None else _NEXT
    text: list[str | Table] = [
        Table(("DEVICE", "STANDING", "GENERATION", "WHAT IS ODD"), rows),
        f"key {found.name}, {what}: {found.why or following.get(found.state, found.state)}",
    ]
    status = Exit.PERSON if found.state == "mixed" else Exit.DONE
    return Report(status, document, text, read_only=True)
