# SPDX-License-Identifier: GPL-2.0-or-later
"""All crash states of one operation on a real volume: judged by libcryptsetup, counted, reconciled, counted again."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from luksrotd.errors import LuksrotdError
from luksrotd.rotation.view import view
from tests.support.crash import Enumeration, Image
from tests.support.crashjudge import Outline, misplaced_writes, pair_of
from tests.support.leftovers import Classifier, Instance, Leftover, Tally
from tests.support.oracle import Libcryptsetup, Oracle
from tests.support.realvolume import RealSimulation, Recorded

SEED = 99


@dataclass(slots=True)
class Examination:
    """What was found.  ``before`` and ``after``: what a power cut leaves, before and after reconcile.

    ``reconciled``: of how many different states the reconcile was run; states whose header blocks are old, new and torn
    alike, and whose areas are alike, are one.
    """

    recorded: Recorded
    states: int = 0
    loads: int = 0
    reconciled: int = 0
    violations: list[str] = field(default_factory=list)
    before: Tally = field(default_factory=Tally)
    after: Tally = field(default_factory=Tally)


@dataclass(slots=True)
class Examiner:
    """``atomic``: each state must be what was before or what is after; else only what reconcile makes of it counts.

    ``reconcile``: also run it; ``depth`` 2: and cut it.  ``worker``: libcryptsetup in a real worker process.
    """

    secrets: Mapping[str, bytes]
    atomic: bool = True
    reconcile: bool = True
    depth: int = 1
    worker: bool = False

    def examine(self, recorded: Recorded, images: Iterable[Image] | None = None) -> Examination:
        """Every state of the operation, or only ``images``."""
        enumeration = recorded.enumeration()
        found = Examination(recorded)
        with Libcryptsetup(recorded.before, recorded.geometry.headers, self.secrets) as tool:
            run = _Run(self, enumeration, tool, found)
            for image in enumeration.images() if images is None else images:
                found.states += 1
                found.before.add(run.classifier.classify(image))
                run.look(image, self.depth)
            found.loads = tool.loads
        if self.atomic:
            found.violations += misplaced_writes(enumeration)
        return found


class _Run:
    """One enumeration."""

    def __init__(self, examiner: Examiner, enumeration: Enumeration, tool: Libcryptsetup, found: Examination) -> None:
        before, after = enumeration.starts[0], enumeration.starts[-1]
        self._examiner = examiner
        self._found = found
        self._sector = enumeration.sector
        self._headers = enumeration.headers
        self._oracle = Oracle(tool, before, after)
        self._ends: dict[Hashable, frozenset[Instance]] = {}
        self._outline = Outline(enumeration.headers, enumeration.starts)
        self.classifier = Classifier(tool, before, after, intended=examiner.atomic or examiner.reconcile)
        if examiner.reconcile:
            self._oracle.also(self._reconciled(before)[0])

    def look(self, image: Image, depth: int) -> None:
        """Judge a state, and what reconcile makes of it."""
        if self._examiner.atomic:
            self._found.violations += self._oracle.judge(image)
        if not self._examiner.reconcile:
            return
        outline = self._outline.of(image)
        if outline not in self._ends:
            self._ends[outline] = frozenset()
            self._ends[outline] = self._end(image, depth)
        if depth == self._examiner.depth:
            self._found.after.add(self._ends[outline])

    def _end(self, image: Image, depth: int) -> frozenset[Instance]:
        """What is left after reconcile; complains of what is not clean then."""
        self._found.reconciled += 1
        wrong = self._found.violations
        try:
            end, simulation = self._reconciled(image)
        except LuksrotdError as error:
            wrong.append(f"reconcile fails: {error.message}")
            return frozenset({(Leftover.LOST, "reconcile")})
        pair = pair_of(end)
        if not pair.agree or view(pair).pending:
            wrong.append("not at an end after reconcile")
        wrong += [f"after reconcile: {what}" for what in self._oracle.judge(end)]
        again, second = self._reconciled(end)
        if second.disk.log or again != end:
            wrong.append("a second reconcile writes")
        if depth > 1:
            inner = Enumeration(image, simulation.disk.epochs(), self._headers, self._sector)
            for state in inner.images():
                self.look(state, depth - 1)
        return self.classifier.classify(end)

    def _reconciled(self, image: Image) -> tuple[Image, RealSimulation]:
        worker = self._examiner.worker
        simulation = RealSimulation(bytes(image), sector_size=self._sector, seed=SEED, worker=worker)
        left = simulation.reconcile().left
        if left:
            self._found.violations += [f"reconcile leaves {finding.code}: {finding.message}" for finding in left]
        return image.written([write for epoch in simulation.disk.epochs() for write in epoch]), simulation


def complaint(found: Examination) -> str:
    """What is wrong, in a line: for an assertion."""
    left = [f"{kind} ({count})" for kind, count in found.after.found.items() if kind is not Leftover.GHOST]
    return "; ".join([*sorted(set(found.violations))[:5], *left])
