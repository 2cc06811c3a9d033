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
from luksrotd.rotation.view import view
from tests.support.crash import Enumeration, Epoch
from tests.support.simulation import Simulation

NAME = "backup"
SEED = 99  # of every reconcile: equal states are repaired by equal bytes, so that depth 2 meets few new ones


@dataclass(slots=True)
class Scenario:
    """One operation: the volume before it, and the writes that it made."""

    before: bytes
    epochs: Sequence[Epoch]
    expected: Expectation
    retired: dict[Extent, str] = field(default_factory=dict)
    gone: dict[int, Opener] = field(default_factory=dict)
    """Generation → the credential that opens nothing once a later generation is current."""
    final_generation: int | None = None

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
    first, last = parse_pair(before), simulation.pair
    generations = _generations(before, first) | _generations(simulation.disk.content, last)
    keep = {
        f"keyslot {number}": opener(first.winner.metadata.keyslots[number], _reader(before))
        for number in view(first).ordinary
    }
    absent = frozenset({NAME}) if not view(first).keys or not view(last).keys else frozenset[str]()
    expected = Expectation(keep, {NAME: generations}, foreign_parts(first.winner), absent)
    final = max((key.token.generation for key in view(last).keys), default=None)
    gone = {n: credential for n, credential in generations.items() if final is not None and n < final}
    retired = {
        slot.area: _material(before, slot.area)
        for key in view(first).keys
        if (slot := key.keyslot) is not None and key.token.generation in gone
    } | {extent: _material(before, extent) for extent in view(first).pending}
    return Scenario(before, epochs[:-1], expected, retired, gone, final)


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
        wrong = self._done(image, pair)
        sequence = check_sequence(parse_pair(self.scenario.before), pair, changed=True)
        wrong += [f"{violation.invariant}: {violation.what}" for violation in sequence]
        if self.scenario.final_generation is not None and _newest(pair) != self.scenario.final_generation:
            wrong.append(f"I6: generation {_newest(pair)} after success")
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
        newest = _newest(pair)
        gone = [
            credential for number, credential in self.scenario.gone.items() if newest is not None and number < newest
        ]
        retired = self.scenario.retired if gone or not self.scenario.gone else {}
        return [f"{v.invariant}: {v.what}" for v in check_done(pair, _reader(image), gone, retired)]


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


def _newest(pair: Pair) -> int | None:
    return max((key.token.generation for key in view(pair).keys), default=None)


def _generations(image: bytes, pair: Pair) -> dict[int, Opener]:
    return {
        key.token.generation: opener(key.keyslot, _reader(image)) for key in view(pair).keys if key.keyslot is not None
    }


def _material(image: bytes, area: Extent) -> str:
    return hashlib.sha256(image[area.offset : area.end]).hexdigest()


def _reader(image: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: image[offset : offset + length]
