# SPDX-License-Identifier: GPL-2.0-or-later
"""The cells of the crash campaign: which operation is examined on which geometry, and how."""

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

from tests.crash import test_mutants as mutants
from tests.crash.test_mutants import PARTS, REORDERS, in_parts, is_caught
from tests.support.crashjudge import Judge, judge_all
from tests.support.crashverbs import SECRETS, VERBS, simulated
from tests.support.examination import Examiner
from tests.support.peers import PEERS, STEPWISE, observed
from tests.support.realvolume import CARRIERS, Geometry, Recorded, recorded

METADATA, BITS, SECTORS = (16, 64, 4096), (512, 256), (512, 4096)
#: Which part of the campaign a cell belongs to.
SIMULATED, REAL, STEPS, PEER, MUTANT = "simulated", "real", "stepwise", "peer", "mutant"
#: One verb for each sequence of phases that there is.
SHAPES = ("rotation", "enrolment", "removal", "other associated data")


#: The geometry on which every verb is examined, by the size of the headers.
PLAIN = {16: Geometry(), 64: Geometry(64), 4096: Geometry(4096, sector=4096)}


@dataclass(frozen=True, slots=True)
class Cell:
    """One enumeration: which part, of what, on which geometry."""

    part: str
    name: str
    geometry: Geometry = Geometry()  # noqa: RUF009 - immutable
    depth: int = 1


@dataclass(slots=True)
class Result:
    """What came of it; ``before`` and ``after`` count the states with each kind of leftover."""

    cell: Cell
    states: int
    reconciled: int = 0
    violations: list[str] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    writes: int = 0
    bytes: int = 0
    flushes: int = 0
    seconds: float = 0.0


def cells(*, small: bool = False, full: bool = False) -> Iterator[Cell]:
    """The campaign, longest first; ``small``: a cell of each part, for the test of the generator.

    Every verb on every carrier and sector size with headers of 16 KiB and keys of 512 bit.  What other sizes change,
    they change for all verbs that write in the same places; so there, unless ``full``, every verb on some geometries,
    and one verb of each such shape on the others (with headers of 4 MiB and sectors of 512 bytes, simulated only).
    """
    if small:
        yield Cell(SIMULATED, "other associated data", Geometry(16, 8, 512, "simulated"), depth=2)
        yield Cell(REAL, "other associated data", Geometry(sector=4096))
        yield Cell(REAL, "rotation", Geometry(sector=4096))
        yield Cell(STEPS, "removal", Geometry(sector=4096))
        yield Cell(PEER, "cryptsetup luksChangeKey", Geometry(sector=4096))
        yield from [Cell(MUTANT, name) for name in (next(iter(REORDERS)), next(iter(PARTS)))]
        return
    for metadata in reversed(METADATA):
        for verb, bits, sector, carrier in product(VERBS, BITS, SECTORS, CARRIERS):
            geometry = Geometry(metadata, bits, sector, carrier)
            if full or _usual(geometry) or (verb in SHAPES and _varied(geometry)):
                yield Cell(REAL, verb, geometry, depth=2 if geometry == Geometry() else 1)
        for verb, sector in product(VERBS, SECTORS):
            if full or metadata < 4096 or verb in SHAPES:
                depth = 2 if metadata < 4096 else 1
                yield Cell(SIMULATED, verb, Geometry(metadata, 8, sector, "simulated"), depth)
    yield from (Cell(STEPS, verb, Geometry(sector=sector)) for verb, sector in product(STEPWISE, SECTORS))
    yield from (Cell(PEER, name, Geometry(sector=sector)) for name, sector in product(PEERS, SECTORS))
    yield from (Cell(MUTANT, name) for name in (*REORDERS, *PARTS))


def _usual(geometry: Geometry) -> bool:
    """On these every verb is examined."""
    small = geometry.metadata == 16 and (geometry.bits == 512 or geometry.sector == 4096)
    return small or geometry == PLAIN[geometry.metadata]


def _varied(geometry: Geometry) -> bool:
    """With headers of 4 MiB, of which each costs a minute: each carrier, and each size of key, once."""
    large = {Geometry(4096, 256, 4096, "loop"), Geometry(4096, sector=4096, carrier="detached")}
    return geometry.metadata < 4096 or geometry in large


def work(cell: Cell) -> Result:
    """Examine one cell."""
    begun = time.monotonic()
    result = {SIMULATED: _simulated, REAL: _real, STEPS: _stepwise, PEER: _peer, MUTANT: _mutant}[cell.part](cell)
    result.seconds = time.monotonic() - begun
    if cell.part != MUTANT:  # which keeps next to nothing
        recorded.cache_clear()
        gc.collect()
    return result


def _simulated(cell: Cell) -> Result:
    scenario = simulated(cell.name, sector=cell.geometry.sector, hdr_size=cell.geometry.metadata * 1024)
    judge = Judge(scenario, depth=cell.depth)
    wrong = judge_all(judge, scenario.enumeration())
    return Result(cell, judge.states, judge.reconciled, wrong)


def _real(cell: Cell) -> Result:
    reconcile = cell.geometry.metadata < 4096 or cell.name in SHAPES
    return examined(cell, recorded(cell.name, cell.geometry), Examiner(SECRETS, depth=cell.depth, reconcile=reconcile))


def _stepwise(cell: Cell) -> Result:
    seen = observed(f"stepwise {cell.name}", cell.geometry)
    return examined(cell, seen.recorded, Examiner(seen.secrets, atomic=False))


def _peer(cell: Cell) -> Result:
    seen = observed(cell.name, cell.geometry)
    return examined(cell, seen.recorded, Examiner(seen.secrets, atomic=False, reconcile=False))


def examined(cell: Cell, operation: Recorded, examiner: Examiner) -> Result:
    """All states of a recorded operation."""
    found = examiner.examine(operation)
    counts = [{str(kind): count for kind, count in tally.found.items()} for tally in (found.before, found.after)]
    sizes = (operation.writes, operation.bytes, len(operation.epochs))
    return Result(cell, found.states, found.reconciled, found.violations, *counts, *sizes)


def _mutant(cell: Cell) -> Result:
    if cell.name in REORDERS:
        verb, mutate = REORDERS[cell.name]
        scenario = mutants.simulated(verb)
        epochs = mutate(scenario.epochs)
    else:
        verb, edit, of, at = PARTS[cell.name]
        scenario, epochs = in_parts(verb, edit, of=of, at=at)
    caught = is_caught(scenario, epochs)
    return Result(cell, 1, violations=[] if caught else ["the mutant survives"])
