# SPDX-License-Identifier: GPL-2.0-or-later
"""Judges crash states of simulated volumes: by the invariants, each valid copy alone, then again after reconcile.

Beside the invariants, every copy must say exactly what the volume said before the operation or what it says after it,
and exactly the credentials of that side must open: all that goes together, never a part of it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from luksrotd.errors import LuksrotdError
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import Which
from luksrotd.luks2.pair import HeaderCopy, Pair, read_pair
from luksrotd.names import TOKEN_TYPE, WIPE_TOKEN_TYPE
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
from luksrotd.rotation.protocol import BLOCK
from luksrotd.rotation.view import view
from tests.support.crash import Enumeration, Epoch, Image
from tests.support.simulation import Simulation

SEED = 99  # of every reconcile: equal states are repaired by equal bytes, so that depth 2 meets few new ones

#: What a copy says, its wipe intents left out, and how the credential of each of its keyslots is recognised.
Meaning = tuple[str, frozenset[tuple[int, Opener]]]


@dataclass(slots=True)
class Scenario:
    """One operation: the volume before it, the writes that it made, and the volume after it."""

    before: bytes
    epochs: Sequence[Epoch]
    after: bytes
    expected: Expectation
    meanings: frozenset[Meaning]
    """What the volume means before and after."""
    sector: int = 512
    retired: dict[Extent, str] = field(default_factory=dict)
    """Areas that the operation gives up, and what was in them."""
    pending: dict[Extent, str] = field(default_factory=dict)
    """Areas that were to be wiped already before it."""
    gone: frozenset[Opener] = frozenset()
    """Credentials that the operation puts out of force, all at once."""
    unclean: bool = False
    """The volume was in disorder before: a copy that still says what was then may be as odd as it was."""

    def enumeration(self, epochs: Sequence[Epoch] | None = None, sector: int | None = None) -> Enumeration:
        """All crash states, of the real epochs or of a mutant's."""
        pair = pair_of(self.before)
        return Enumeration(
            self.before, self.epochs if epochs is None else epochs, 2 * pair.hdr_size, sector or self.sector
        )


def record(
    before: bytes,
    operate: Callable[[Simulation], object],
    sector_size: int = 512,
    *,
    releases: bool = False,
    unclean: bool = False,
) -> Scenario:
    """Run ``operate`` on a volume, and say what must hold at every instant of it.

    ``releases``: a keyslot that a token of ours names before may be without a token afterwards.  ``unclean``: the
    volume is in disorder before.
    """
    simulation = Simulation(before, sector_size=sector_size)
    operate(simulation)
    epochs = simulation.disk.epochs()
    assert not epochs[-1], "the last write was not flushed"
    scenario = scenario_of(before, epochs[:-1], simulation.disk.content, sector_size, releases=releases)
    return replace(scenario, unclean=unclean)


def scenario_of(
    before: bytes, epochs: Sequence[Epoch], after: bytes, sector_size: int = 512, *, releases: bool = False
) -> Scenario:
    """The same of writes that were recorded elsewhere."""
    first, last = pair_of(before), pair_of(after)
    # Before it begins, the copies may differ already; then what each of them says may hold.
    sides = [(before, alone) for alone in _copies(first)] + [(after, alone) for alone in _copies(last)]
    old = {found for alone in _copies(first) for found in openers_of(before, alone.winner).values()}
    left = openers_of(after, last.winner)
    gone = frozenset(old) - frozenset(left.values())
    ordinary = openers_of(before, first.winner)
    loose = {ordinary[number] for number in view(first).ordinary}
    keep = {f"keyslot {number}": ordinary[number] for number in view(first).ordinary if ordinary[number] not in gone}
    if releases:
        loose |= {left[number] for number in view(last).ordinary if left[number] in old}
    names = {key.token.name for _, alone in sides for key in view(alone).keys}
    expected = Expectation(
        keep,
        {name: {g: o for image, side in sides for g, o in _generations(image, side, name).items()} for name in names},
        {name: frozenset(_standing(alone, name) for _, alone in sides) for name in names},
        tuple(foreign_parts(alone.winner) for _, alone in sides),
        frozenset(loose),
        frozenset((key.token.name, key.token.generation) for key in view(first).keys if not key.token.keyslots),
    )
    pending = {extent: _material(before, extent) for extent in view(first).pending}
    retired = {area: _material(before, area) for area in first.referenced if area not in last.referenced}
    meanings = frozenset(meaning(image, alone.winner) for image, alone in sides)
    return Scenario(before, epochs, after, expected, meanings, sector_size, retired, pending, gone)


class Judge:
    """Finds what is wrong with states of a scenario; counts the states, and judges none twice.

    States that reconcile cannot tell apart, because the same blocks of their headers are old, new or torn, are
    reconciled once; ``thorough`` reconciles each.
    """

    def __init__(
        self, scenario: Scenario, *, depth: int = 1, sector: int | None = None, thorough: bool = False
    ) -> None:
        self.scenario = scenario
        self.sector = sector or scenario.sector
        self.depth = depth
        self.thorough = thorough
        self.states = 0
        self.reconciled = 0
        self._judged: dict[Hashable, int] = {}
        self._outlines: dict[Hashable, int] = {}
        self._headers = 2 * pair_of(scenario.before).hdr_size
        self._pairs: dict[bytes, Pair] = {}
        self._outline = Outline(self._headers, scenario.enumeration(sector=self.sector).starts)
        self._mended = self._with_mended()
        odd = list(self._oddities(scenario.before, scenario)) if scenario.unclean else []
        self._excused = {re.sub(r"\w+ copy alone", f"{which} copy alone", what) for what in odd for which in Which}

    def violations(self, image: Image | bytes, depth: int | None = None) -> list[str]:
        """What is wrong with this state, or with what reconcile makes of it, or of a crash inside reconcile."""
        image = as_image(image, self.scenario.before, self.sector)
        depth = self.depth if depth is None else depth
        if not _first(self._judged, image.key, depth):
            return []
        self.states = len(self._judged)
        try:
            wrong = self._instant(image, inner=depth < self.depth)
            if not wrong and _first(self._outlines, image.key if self.thorough else self._outline.of(image), depth):
                self.reconciled += 1
                wrong = self._after_reconcile(image, depth)
        except LuksrotdError as error:
            return [f"lost: {error.message}"]
        return wrong

    def finished(self, image: Image | bytes) -> list[str]:
        """What is wrong with a state that can be met after the operation has reported success."""
        pair = self._pair(image)
        scenario = self.scenario
        before, after = self._pair(scenario.before), self._pair(scenario.after)
        found = check_done(pair, reader(image), scenario.gone, scenario.retired | scenario.pending)
        changed = not before.winner.same_content(after.winner)
        found += check_sequence(before, pair, changed=changed)
        wrong = [f"{violation.invariant}: {violation.what}" for violation in found]
        if pair.winner.metadata.raw != after.winner.metadata.raw:
            wrong.append("I6: not what was reported")
        return wrong

    def _pair(self, image: Image | bytes) -> Pair:
        """Both copies, parsed once for equal headers."""
        headers = image[: self._headers]
        if headers not in self._pairs:
            self._pairs[headers] = pair_of(image)
        return self._pairs[headers]

    def _with_mended(self) -> Scenario:
        """The scenario once reconcile has run: it may mend what was wrong before the operation."""
        scenario = self.scenario
        simulation = Simulation(scenario.before, seed=SEED, sector_size=self.sector)
        simulation.reconcile()
        mended, pair = simulation.disk.content, simulation.pair
        allowed = {name: there | {_standing(pair, name)} for name, there in scenario.expected.allowed.items()}
        meanings = scenario.meanings | {meaning(mended, pair.winner)}
        return replace(scenario, expected=replace(scenario.expected, allowed=allowed), meanings=meanings)

    def _oddities(self, image: Image | bytes, scenario: Scenario) -> Iterator[str]:
        found = check_instant(self._pair(image), reader(image), scenario.expected)
        return (f"{violation.invariant}: {violation.what}" for violation in found)

    def _instant(self, image: Image | bytes, *, inner: bool = False, mended: bool = False) -> list[str]:
        """``inner``: a state inside reconcile; ``mended``: one after it."""
        scenario = self._mended if inner or mended else self.scenario
        pair = self._pair(image)
        wrong = [what for what in self._oddities(image, scenario) if mended or what not in self._excused]
        sequence = check_sequence(self._pair(self.scenario.before), pair, changed=False)
        wrong += [f"{violation.invariant}: {violation.what}" for violation in sequence]
        for copy in pair.valid:
            if meaning(image, copy) not in scenario.meanings:
                wrong.append(f"I3: the {copy.header.which} copy alone is neither what was before nor what is after")
        return wrong

    def _after_reconcile(self, image: Image, depth: int) -> list[str]:
        simulation = Simulation(bytes(image), seed=SEED, sector_size=self.sector)
        left = simulation.reconcile().left
        after = simulation.disk.content
        if left:
            return [f"I7: reconcile leaves {finding.code}: {finding.message}" for finding in left]
        wrong = [f"after reconcile: {what}" for what in (*self._instant(after, mended=True), *self._done(after))]
        again = Simulation(after, seed=SEED + 1, sector_size=self.sector)
        again.reconcile()
        if again.disk.log:
            wrong.append("I7: a second reconcile writes")
        if depth > 1 and not wrong:
            inner = Enumeration(image, simulation.disk.epochs(), 2 * simulation.pair.hdr_size, self.sector)
            for state in inner.images():
                wrong += [f"crash in reconcile: {what}" for what in self.violations(state, depth - 1)]
        return wrong

    def _done(self, image: bytes) -> Iterator[str]:
        scenario, pair = self.scenario, self._pair(image)
        there = frozenset(openers_of(image, pair.winner).values()) & scenario.gone
        gone = bool(scenario.gone) and not there
        retired = scenario.pending | scenario.retired if gone else scenario.pending
        for violation in check_done(pair, reader(image), (), retired):
            yield f"{violation.invariant}: {violation.what}"


class Outline:
    """What reconcile can see of a state: which blocks of its headers are those of which moment, and all behind them."""

    def __init__(self, headers: int, starts: Sequence[Image]) -> None:
        self._headers = headers
        self._known: dict[int, dict[bytes, int]] = {}
        for moment, start in enumerate(starts):
            for number in self._blocks(start):
                self._known.setdefault(number, {}).setdefault(start.read(number * BLOCK, BLOCK), moment)

    def of(self, image: Image) -> Hashable:
        """Equal for states that reconcile cannot tell apart."""
        seen = tuple(
            (number, self._known.get(number, {}).get(image.read(number * BLOCK, BLOCK), -1))
            for number in sorted(self._blocks(image))
        )
        return seen, image.changes_from(self._headers)

    def _blocks(self, image: Image) -> set[int]:
        """The header blocks that are not those of the base; the others are alike in all states."""
        return {n * image.sector // BLOCK for n in image.changes if n * image.sector < self._headers}


def judge_all(judge: Judge, enumeration: Enumeration) -> list[str]:
    """The violations of every state, and of the states after success."""
    wrong = [what for image in enumeration.images() for what in judge.violations(image)]
    return wrong + judge.finished(enumeration.starts[-1]) + misplaced_writes(enumeration)


def misplaced_writes(enumeration: Enumeration) -> list[str]:
    """Writes of an epoch that hit what a copy references when the epoch begins."""
    return [
        f"{violation.invariant}: {violation.what}"
        for start, epoch in zip(enumeration.starts, enumeration.epochs, strict=False)
        for write in epoch
        for violation in check_write(pair_of(start), Extent(write.offset, len(write.data)))
    ]


def meaning(image: Image | bytes, copy: HeaderCopy) -> Meaning:
    """What a copy says, and how its credentials are recognised; its wipe intents are no part of it."""
    raw = copy.metadata.raw
    tokens: dict[str, Any] = {
        number: {member: value for member, value in token.items() if token["type"] != TOKEN_TYPE or member != "wipe"}
        for number, token in raw["tokens"].items()
        if token["type"] != WIPE_TOKEN_TYPE
    }
    text = json.dumps({**raw, "tokens": tokens}, sort_keys=True)
    return text, frozenset(openers_of(image, copy).items())


def openers_of(image: Image | bytes, copy: HeaderCopy) -> Mapping[int, Opener]:
    """How the credential of each keyslot of a copy is recognised."""
    return {number: opener(slot, reader(image)) for number, slot in copy.metadata.keyslots.items()}


def pair_of(image: Image | bytes) -> Pair:
    """Both copies; raises what ``read_pair`` raises."""
    return read_pair(reader(image), len(image))


def reader(image: Image | bytes) -> Callable[[int, int], bytes]:
    """How to read an image."""
    if isinstance(image, Image):
        return image.read
    return lambda offset, length: image[offset : offset + length]


def as_image(image: Image | bytes, base: bytes, sector: int) -> Image:
    """The same as an ``Image`` over ``base``."""
    if isinstance(image, Image):
        return image
    numbers = range(len(base) // sector)
    return Image(base, sector, {n: image[n * sector : (n + 1) * sector] for n in numbers})


def _first(seen: dict[Hashable, int], what: Hashable, depth: int) -> bool:
    """Whether it has not been seen yet at that depth, or deeper; remembers it."""
    if seen.get(what, -1) >= depth:
        return False
    seen[what] = depth
    return True


def _copies(pair: Pair) -> list[Pair]:
    """Each valid copy alone."""
    return [Pair(copy, copy, pair.raw) for copy in pair.valid]


def _generations(image: bytes, pair: Pair, name: str) -> dict[int, Opener]:
    openers = openers_of(image, pair.winner)
    return {key.token.generation: openers[key.keyslot.id] for key in view(pair).named(name) if key.keyslot is not None}


def _standing(pair: Pair, name: str) -> tuple[int, int]:
    line = lineage(view(pair), name)
    current, staged = line.current, line.staged
    return (current.token.generation if current else 0, staged.token.generation if staged else 0)


def _material(image: bytes, area: Extent) -> str:
    return hashlib.sha256(image[area.offset : area.end]).hexdigest()
