# SPDX-License-Identifier: GPL-2.0-or-later
"""A recorded scenario: the disk when it began, every write and flush from then on, and what was used in it.

A folder with three files, so that it can be judged again and elsewhere: ``base.img``, ``log`` (``writelog``),
``facts.json``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.powercut.disk import MARKS, STATE, USED, VOLUMES, headers_of, mark_of
from tests.powercut.scenarios import SCENARIOS, Scenario
from tests.powercut.states import Part, Timeline, epochs_of, without_flushes
from tests.powercut.writelog import Request, parse, serialise
from tests.support.crash import Image
from tests.support.simdisk import Write

BEGUN: Final = "begun"


@dataclass(frozen=True, slots=True)
class Facts:
    """``secrets`` by name, ``volumes``: bytes of the headers of each, ``machine``: what the machine said of itself."""

    scenario: str
    release: str
    secrets: Mapping[str, str]
    headers: Sequence[int]
    machine: Sequence[str]


@dataclass(frozen=True, slots=True)
class Recording:
    """See above."""

    base: bytes
    requests: Sequence[Request]
    facts: Facts

    @property
    def scenario(self) -> Scenario:
        """What was recorded."""
        return SCENARIOS[self.facts.scenario]

    @property
    def volumes(self) -> list[Part]:
        """The headers of the volumes, with their keyslots, on the disk."""
        return [
            Part(part.name, part.offset, size, fragile=True)
            for part, size in zip(VOLUMES, self.facts.headers, strict=False)
        ]

    def timeline(self) -> Timeline:
        """All the states."""
        parts = [MARKS, STATE, *self.volumes]
        epochs = epochs_of(self.requests, parts)
        return Timeline(self.base, without_flushes(epochs) if self.scenario.ignore_flushes else epochs, parts)

    def moments(self) -> list[Image]:
        """The disk when it was quiet: at the beginning, and when each step had been marked."""
        parts = [MARKS, STATE, *self.volumes]
        found = [Image(self.base)]
        image = found[0]
        for request in self.requests:
            if request.write is not None and any(part.holds(request.write) for part in parts):
                image = image.written([request.write])
                if MARKS.holds(request.write) and mark_of(request.write.data):
                    found.append(image)
        return found

    def save(self, folder: Path) -> None:
        """Into a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        sparse(folder / "base.img", self.base)
        (folder / "log").write_bytes(serialise(self.requests))
        facts = {name: getattr(self.facts, name) for name in Facts.__slots__}
        (folder / "facts.json").write_text(json.dumps(facts, indent=2, sort_keys=True), encoding="utf-8")


def load(folder: Path) -> Recording:
    """From a folder."""
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return Recording((folder / "base.img").read_bytes(), parse((folder / "log").read_bytes()), Facts(**facts))


def cut_out(disk: bytes, log: Sequence[Request], facts: Facts) -> Recording:
    """What was recorded since the scenario began, of a disk that was ``disk`` before the first request of ``log``.

    Raises ``ValueError`` if the scenario has not marked all its steps.
    """
    marks = [mark_of(one.write.data) if one.write and MARKS.holds(one.write) else None for one in log]
    wanted = [BEGUN, *SCENARIOS[facts.scenario].steps]
    if [mark for mark in marks if mark] != wanted:
        raise ValueError(f"the steps that were marked are {[mark for mark in marks if mark]}, not {wanted}")
    first = marks.index(BEGUN) + 1
    base = bytearray(disk[:USED])
    for one in log[:first]:
        if one.write is not None:
            apply(base, one.write)
    volumes = VOLUMES[: len(SCENARIOS[facts.scenario].volumes)]
    headers = [headers_of(bytes(base[part.offset : part.offset + part.size])) for part in volumes]
    kept = [one for one in log[first:] if one.write is None or one.write.offset < USED]
    return Recording(bytes(base), kept, Facts(facts.scenario, facts.release, facts.secrets, headers, facts.machine))


def apply(disk: bytearray, write: Write) -> None:
    """Write, where the disk is long enough."""
    room = max(len(disk) - write.offset, 0)
    data = write.data[:room]
    disk[write.offset : write.offset + len(data)] = data


def sparse(path: Path, content: bytes) -> None:
    """Write a file, with holes for what is zero."""
    block = 65536
    with path.open("wb") as file:
        file.truncate(len(content))
        for offset in range(0, len(content), block):
            part = content[offset : offset + block]
            if part.strip(b"\0"):
                file.seek(offset)
                file.write(part)
