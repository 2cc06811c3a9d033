# SPDX-License-Identifier: GPL-2.0-or-later
"""Judges crash states of simulated volumes: by the invariants, each valid copy alone, then again after reconcile."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from luksrotd.errors import LuksrotdError
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.pair import Pair, parse_pair
from luksrotd.rotation.invariants import (
    Expectation,
    Opener,
    check_done,
    check_instant,
    check_sequence,
    check_write,
    foreign_parts,
    opener,
)
from luksrotd.rotation.lineage import lineage
from luksrotd.rotation.view import view
from tests.support.crash import Enumeration, Epoch
from tests.support.simulation import Simulation

SEED = 99  # of every reconcile: equal states are repaired by equal bytes, so that depth 2 meets few new ones


@dataclass(slots=True)
class Scenario:
    """One operation: the volume before it, the writes that it made, and the volume after it."""

    before: bytes
    epochs: Sequence[Epoch]
    after: bytes
    expected: Expectation
    retired: dict[Extent, str] = field(default_factory=dict)
    """Areas that the operation gives up, and what was in them."""
    pending: dict[Extent, str] = field(default_factory=dict)
    """Areas that were to be wiped already before it."""
    gone: frozenset[Opener] = frozenset()
    """Credentials that the operation puts out of force, all at once."""

    def enumeration(self, epochs: Sequence[Epoch] | None = None, sector: int = 512) -> Enumeration:
        """All crash states, of the real epochs or of a mutant's."""
        pair = parse_pair(self.before)
        return Enumeration(self.before, self.epochs if epochs is None else epochs, 2 * pair.hdr_size, sector)


def record(before: bytes, operate: Callable[[Simulation], object], sector_size: int = 512) -> Scenario:
    """Run ``operate`` on a volume, and say what must hold at every instant of it."""
    simulation = Simulation(before, sector_size=sector_size)
    operate(simulation)
    epochs = simulation.disk.epochs()
    assert not epochs[-1], "the last write was not flushed"
    after = simulation.disk.content
    first, last = parse_pair(before), simulation.pair
    openers, left = openers_of(before, first), openers_of(after, last)
    gone = frozenset(openers.values()) - frozenset(left.values())
    keep = {f"keyslot {number}": openers[number] for number in view(first).ordinary if openers[number] not in gone}
    names = {key.token.name for key in (*view(first).keys, *view(last).keys)}
    expected = Expectation(
        keep,
        {name: _generations(before, first, name) | _generations(after, last, name) for name in names},
        {name: frozenset({_standing(first, name), _standing(last, name)}) for name in names},
        (foreign_parts(first.winner), foreign_parts(last.winner)),
    )
    pending = {extent: _material(before, extent) for extent in view(first).pending}
    retired = {area: _material(before, area) for area in first.referenced if area not in last.referenced}
    return Scenario(before, epochs[:-1], after, expected, retired, pending, gone)


class Judge:
    """Finds what is wrong with states of a scenario; counts the states, and judges none twice."""

    def __init__(self, scenario: Scenario, *, depth: int = 1, sector: int = 512) -> None:
        self.scenario = scenario
        self.sector = sector
        self.depth = depth
        self.states = 0
        self._judged: set[int] = set()

    def violations(self, image: bytes, depth: int | None = None) -> list[str]:
        """What is wrong with this state, or with what reconcile makes of it, or of a crash inside reconcile."""
        if hash(image) in self._judged:
            return []
        self._judged.add(hash(image))
        self.states += 1
        try:
            pair = parse_pair(image)
            before = parse_pair(self.scenario.before)
            found = check_instant(pair, _reader(image), self.scenario.expected)
            found += check_sequence(before, pair, changed=False)
            wrong = [f"{violation.invariant}: {violation.what}" for violation in found]
            return wrong or self._after_reconcile(image, self.depth if depth is None else depth)
        except LuksrotdError as error:
            return [f"lost: {error.message}"]

    def finished(self, image: bytes) -> list[str]:
        """What is wrong with a state that can be met after the operation has reported success."""
        pair = parse_pair(image)
        scenario = self.scenario
        before, after = parse_pair(scenario.before), parse_pair(scenario.after)
        found = check_done(pair, _reader(image), scenario.gone, scenario.retired | scenario.pending)
        changed = not before.winner.same_content(after.winner)
        found += check_sequence(before, pair, changed=changed)
        wrong = [f"{violation.invariant}: {violation.what}" for violation in found]
        if pair.winner.metadata.raw != after.winner.metadata.raw:
            wrong.append("I6: not what was reported")
        return wrong

    def _after_reconcile(self, image: bytes, depth: int) -> list[str]:
        simulation = Simulation(image, seed=SEED)
        left = simulation.reconcile().left
        after = simulation.disk.content
        if left:
            return [f"I7: reconcile leaves {finding.code}: {finding.message}" for finding in left]
        wrong = [
            f"after reconcile: {v.invariant}: {v.what}"
            for v in check_instant(simulation.pair, _reader(after), self.scenario.expected)
        ]
        wrong += [f"after reconcile: {what}" for what in self._done(after, simulation.pair)]
        again = Simulation(after, seed=SEED + 1)
        again.reconcile()
        if again.disk.log:
            wrong.append("I7: a second reconcile writes")
        if depth > 1 and not wrong:
            inner = Enumeration(image, simulation.disk.epochs(), 2 * simulation.pair.hdr_size, self.sector)
            for state in inner.images():
                wrong += [f"crash in reconcile: {what}" for what in self.violations(state, depth - 1)]
        return wrong

    def _done(self, image: bytes, pair: Pair) -> list[str]:
        scenario = self.scenario
        there = frozenset(openers_of(image, pair).values()) & scenario.gone
        if there and there != scenario.gone:
            return ["I3: a part of what goes together has gone"]
        gone = bool(scenario.gone) and not there
        retired = scenario.pending | scenario.retired if gone else scenario.pending
        return [f"{v.invariant}: {v.what}" for v in check_done(pair, _reader(image), (), retired)]


def judge_all(judge: Judge, enumeration: Enumeration) -> list[str]:
    """The violations of every state, and of the states after success."""
    wrong = [what for image in enumeration.images() for what in judge.violations(image)]
    return wrong + judge.finished(enumeration.final) + misplaced_writes(enumeration)


def misplaced_writes(enumeration: Enumeration) -> list[str]:
    """Writes of an epoch that hit what a copy references when the epoch begins."""
    return [
        f"{violation.invariant}: {violation.what}"
        for start, epoch in zip(enumeration.starts, enumeration.epochs, strict=False)
        for write in epoch
        for violation in check_write(parse_pair(start), Extent(write.offset, len(write.data)))
    ]


def openers_of(image: bytes, pair: Pair) -> dict[int, Opener]:
    """How the credential of each keyslot of the winning copy is recognised."""
    return {number: opener(slot, _reader(image)) for number, slot in pair.winner.metadata.keyslots.items()}


def _generations(image: bytes, pair: Pair, name: str) -> dict[int, Opener]:
    openers = openers_of(image, pair)
    return {key.token.generation: openers[key.keyslot.id] for key in view(pair).named(name) if key.keyslot is not None}


def _standing(pair: Pair, name: str) -> tuple[int, int]:
    line = lineage(view(pair), name)
    current, staged = line.current, line.staged
    return (current.token.generation if current else 0, staged.token.generation if staged else 0)


def _material(image: bytes, area: Extent) -> str:
    return hashlib.sha256(image[area.offset : area.end]).hexdigest()


def _reader(image: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: image[offset : offset + length]
