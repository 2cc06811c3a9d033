# SPDX-License-Identifier: GPL-2.0-or-later
"""The crash states of the stepwise engine: real writes of real libcryptsetup, judged by real libcryptsetup.

What must hold in every state, as it is and for each valid header copy alone: the administrator's key opens; the
generation that the header says is in force opens by its own secret; every keyslot is the administrator's or has a
token.  After reconcile: what holds after the atomic engine's operations.
"""

import sys
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from luksrotd.errors import EngineError, LuksrotdError
from luksrotd.luks2.pair import BadCopy, Pair, parse_pair
from luksrotd.names import STEPWISE
from luksrotd.rotation.lineage import lineage
from luksrotd.rotation.view import view
from tests.support import stepdriver
from tests.support.crash import Enumeration, Image
from tests.support.makeimage import make_image
from tests.support.oracle import Libcryptsetup, healed
from tests.support.realvolume import RealSimulation
from tests.support.recorder import record
from tests.support.simulation import MAIN, NEW, OLD

MIB: Final = 1024 * 1024
#: What has to be done before each verb.
BEFORE: Final = {
    "enroll": (),
    "rotate": ("enroll",),
    "stage": ("enroll",),
    "finish": ("enroll", "stage"),
    "abort": ("enroll", "stage"),
    "remove": ("enroll",),
}
SECRETS: Final = {"main": MAIN, "old": OLD, "new": NEW}
#: Whose secret each generation has.
OWNERS: Final = {1: "old", 2: "new"}


class StepOracle:
    """Judges states: old pairs may be there beside the one in force, in whatever state, if a token names them."""

    def __init__(self, tool: Libcryptsetup, *, may_be_absent: bool) -> None:
        self.tool = tool
        self._may_be_absent = may_be_absent

    def judge(self, image: Image) -> list[str]:
        """What is wrong with the state: as it is, and by each of its valid copies alone."""
        try:
            masks = {"both copies": image, **self.tool.alone(image)}
            return [f"{name}: {what}" for name, masked in masks.items() for what in self._judge(masked)]
        except LuksrotdError as error:
            return [f"lost: {error.message}"]

    def _judge(self, image: Image) -> Iterator[str]:
        try:
            loaded = self.tool.load(image)
        except EngineError as error:
            yield f"libcryptsetup cannot load it: {error.message}"
            return
        winner, pair = self.tool.pair(image).winner, self.tool.pair(loaded.image)
        if loaded.raw != winner.metadata.raw or not healed(pair) or not winner.same_content(pair.winner):
            yield "libcryptsetup chose another copy than we, or did not recover the bad one"
        if loaded.keyslots.get(0) != "main":
            yield "the main passphrase does not open"
        seen = view(pair)
        line = lineage(seen, "backup")
        if line.unclear:
            yield line.unclear
        if seen.ordinary != (0,):
            yield f"keyslots {seen.ordinary} without a token"
        if line.current is None and not self._may_be_absent:
            yield "no generation is in force"
        for key in (line.current, line.staged):
            if key is None:
                continue
            generation = key.token.generation
            if key.keyslot is None or loaded.keyslots[key.keyslot.id] != OWNERS[generation]:
                yield f"generation {generation} ({key.token.state}) does not open"


@dataclass(slots=True)
class StepwiseVerb:
    """One verb's crash states, and what was found wrong with them."""

    verb: str
    enumeration: Enumeration
    states: int = 0
    reconciled: int = 0
    wrong: list[str] = field(default_factory=list)

    def judge(self, *, until_wrong: bool = False) -> None:
        """Every state, by libcryptsetup; with ``until_wrong`` none after the first bad one."""
        with self._tool() as tool:
            oracle = self._oracle(tool)
            for image in self.enumeration.images():
                self.states += 1
                self.wrong += [f"{self.verb}: {what}" for what in oracle.judge(image)]
                if until_wrong and self.wrong:
                    return

    def reconcile(self) -> None:
        """Every state whose header means something else than those before it."""
        seen: set[Hashable] = set()
        with self._tool() as tool:
            oracle = self._oracle(tool)
            for image in self.enumeration.images():
                meaning = _meaning(tool.pair(image))
                if meaning not in seen:
                    seen.add(meaning)
                    self._reconcile(image, oracle)

    def _reconcile(self, image: Image, oracle: StepOracle) -> None:
        """To one of the two ends, with nothing left of the other."""
        simulation = RealSimulation(bytes(image), sector_size=image.sector)
        self.reconciled += 1
        wrong = [f"{found.code}: {found.message}" for found in simulation.reconcile().left]
        content, pair = simulation.disk.content, simulation.pair
        wrong += [] if pair.agree else ["the copies differ"]
        before = bytes(self.enumeration.base)
        wrong += oracle.judge(Image(before, image.sector, _changes(before, content, image.sector)))
        if _said(pair) not in [_said(parse_pair(end)) for end in (before, self.enumeration.final)]:
            wrong.append("neither as before nor as after")
        for area in parse_pair(before).referenced:
            kept = content[area.offset : area.end] == before[area.offset : area.end]
            if kept and area not in pair.referenced:
                wrong.append("the retired area is intact")
        logged = len(simulation.disk.log)
        simulation.reconcile()
        if len(simulation.disk.log) != logged:
            wrong.append("a second reconcile writes")
        self.wrong += [f"{self.verb}, after reconcile: {what}" for what in wrong]

    def _tool(self) -> Libcryptsetup:
        tool = Libcryptsetup(bytes(self.enumeration.base), self.enumeration.headers, SECRETS)
        tool.learn([self.enumeration.starts[0], self.enumeration.starts[-1]])
        return tool

    def _oracle(self, tool: Libcryptsetup) -> StepOracle:
        return StepOracle(tool, may_be_absent=self.verb in ("enroll", "remove"))


def recorded(verb: str, directory: Path, sector: int = 512) -> StepwiseVerb:
    """``verb`` by the stepwise engine on a volume of 4 MiB in ``directory``, seen by strace."""
    image = make_image(directory / f"{verb}.img", key=MAIN, keyslots_size=2 * MIB, size=4 * MIB)
    for earlier in BEFORE[verb]:
        stepdriver.run(STEPWISE, earlier, str(image))
    command = [sys.executable, "-P", "-m", "tests.support.stepdriver", verb, str(image), STEPWISE]
    recording = record(command, image, environment={"PYTHONPATH": str(Path(__file__).parents[2])})
    assert recording.status == 0, recording.stderr.decode()
    assert not recording.epochs[-1], "the last write was not flushed"
    epochs = [epoch for epoch in recording.epochs if epoch]
    return StepwiseVerb(verb, Enumeration(recording.before, epochs, 2 * parse_pair(recording.before).hdr_size, sector))


def _meaning(pair: Pair) -> tuple[object, ...]:
    """All that reconcile can go by: the winner, and what the other copy is (one that is bad is never read)."""
    return (
        pair.winner.raw,
        *(copy.which if isinstance(copy, BadCopy) else copy.raw for copy in (pair.primary, pair.secondary)),
    )


def _changes(before: bytes, after: bytes, sector: int) -> dict[int, bytes]:
    """The sectors that differ."""
    return {
        n: after[n * sector : (n + 1) * sector]
        for n in range(len(before) // sector)
        if before[n * sector : (n + 1) * sector] != after[n * sector : (n + 1) * sector]
    }


def _said(pair: Pair) -> object:
    """Which generations are there, in which state, on which keyslots, and whose the other keyslots are."""
    keys = [(key.token.generation, key.token.state, key.complete, key.token.retires) for key in view(pair).keys]
    return sorted(keys), view(pair).ordinary
