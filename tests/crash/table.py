# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole campaign, and docs/crash-states.md from it: ``make crash-table``, or ``python -m tests.crash.table``.

Fixed seeds, no clock in what is examined: two runs on one version of libcryptsetup differ by salts and keys alone.
"""

import argparse
import datetime
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from tests.crash.test_mutants import PARTS, REORDERS, in_parts, is_caught
from tests.support.crashjudge import Judge, judge_all
from tests.support.crashverbs import SECRETS, VERBS, simulated
from tests.support.examination import Examiner
from tests.support.leftovers import Leftover
from tests.support.makeimage import run
from tests.support.peers import PEERS, STEPWISE, observed
from tests.support.realvolume import CARRIERS, Geometry, Recorded, recorded

PAGE = Path(__file__).parents[2] / "docs" / "crash-states.md"
METADATA, BITS, SECTORS = (16, 64, 4096), (512, 256), (512, 4096)
#: Which part of the campaign a cell belongs to.
SIMULATED, REAL, STEPS, PEER, MUTANT = "simulated", "real", "stepwise", "peer", "mutant"
#: One verb for each sequence of phases that there is.
SHAPES = ("rotation", "enrolment", "removal", "other associated data")
#: The columns of the comparison: what all of them do is to put a new backup key in place of an old one.
COMPARED = ((REAL, "rotation"), (STEPS, "rotation"), *((PEER, name) for name in PEERS))
KINDS = tuple(str(kind) for kind in Leftover)


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

    Every verb on every geometry with headers of 16 KiB.  What larger headers change, they change for all verbs that
    write in the same places; so there, unless ``full``, one verb of each such shape on every geometry, and every verb
    on one.
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
            plain = carrier == "image" and bits == 512 and sector == 512
            if full or metadata == 16 or plain or verb in SHAPES:
                yield Cell(REAL, verb, geometry, depth=2 if geometry == Geometry() else 1)
        for verb, sector in product(VERBS, SECTORS):
            if full or metadata < 4096 or verb in SHAPES:
                depth = 2 if metadata < 4096 else 1
                yield Cell(SIMULATED, verb, Geometry(metadata, 8, sector, "simulated"), depth)
    yield from (Cell(STEPS, verb, Geometry(sector=sector)) for verb, sector in product(STEPWISE, SECTORS))
    yield from (Cell(PEER, name, Geometry(sector=sector)) for name, sector in product(PEERS, SECTORS))
    yield from (Cell(MUTANT, name) for name in (*REORDERS, *PARTS))


def work(cell: Cell) -> Result:
    """Examine one cell."""
    begun = time.monotonic()
    result = {SIMULATED: _simulated, REAL: _real, STEPS: _stepwise, PEER: _peer, MUTANT: _mutant}[cell.part](cell)
    result.seconds = time.monotonic() - begun
    recorded.cache_clear()
    gc.collect()
    return result


def _simulated(cell: Cell) -> Result:
    scenario = simulated(cell.name, sector=cell.geometry.sector, hdr_size=cell.geometry.metadata * 1024)
    judge = Judge(scenario, depth=cell.depth)
    wrong = judge_all(judge, scenario.enumeration())
    return Result(cell, judge.states, judge.reconciled, wrong)


def _real(cell: Cell) -> Result:
    return _examined(cell, recorded(cell.name, cell.geometry), Examiner(SECRETS, depth=cell.depth))


def _stepwise(cell: Cell) -> Result:
    seen = observed(f"stepwise {cell.name}", cell.geometry)
    return _examined(cell, seen.recorded, Examiner(seen.secrets, atomic=False))


def _peer(cell: Cell) -> Result:
    seen = observed(cell.name, cell.geometry)
    return _examined(cell, seen.recorded, Examiner(seen.secrets, atomic=False, reconcile=False))


def _examined(cell: Cell, operation: Recorded, examiner: Examiner) -> Result:
    found = examiner.examine(operation)
    counts = [{str(kind): count for kind, count in tally.found.items()} for tally in (found.before, found.after)]
    sizes = (operation.writes, operation.bytes, len(operation.epochs))
    return Result(cell, found.states, found.reconciled, found.violations, *counts, *sizes)


def _mutant(cell: Cell) -> Result:
    if cell.name in REORDERS:
        verb, mutate = REORDERS[cell.name]
        scenario, epochs = simulated(verb), mutate(simulated(verb).epochs)
    else:
        verb, edit, of, at = PARTS[cell.name]
        scenario, epochs = in_parts(verb, edit, of=of, at=at)
    caught = is_caught(scenario, epochs)
    return Result(cell, 1, violations=[] if caught else ["the mutant survives"])


def campaign(chosen: Sequence[Cell], processes: int, tell: Callable[[str], None]) -> list[Result]:
    """All cells, in as many processes; in the order of ``chosen``."""
    results: dict[Cell, Result] = {}
    # Spawned: libcryptsetup has threads and process-wide state that a fork would share.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=40) as pool:
        running = {pool.submit(work, cell): cell for cell in chosen}
        for done in as_completed(running):
            result = results[running[done]] = done.result()
            cell = result.cell
            trouble = f", {len(result.violations)} VIOLATIONS: {result.violations[0]}" if result.violations else ""
            where = "" if cell.part == MUTANT else f" [{cell.geometry}]"
            tell(f"{len(results)}/{len(running)} {cell.part} {cell.name}{where}: {result.states} states"
                 f"{trouble} ({result.seconds:.1f} s)")  # fmt: skip
    return [results[cell] for cell in chosen]


def wrong(results: Iterable[Result]) -> list[str]:
    """What must not be: violations, and whatever reconcile has not cleaned up."""
    found = [f"{r.cell.part} {r.cell.name} [{r.cell.geometry}]: {what}" for r in results for what in r.violations]
    for r in results:
        left = {kind: count for kind, count in r.after.items() if kind != Leftover.GHOST}
        found += [f"{r.cell.part} {r.cell.name} [{r.cell.geometry}]: after reconcile {kind} in {count} states"
                  for kind, count in left.items()]  # fmt: skip
    return found


def page(results: Sequence[Result], command: str, seconds: float) -> str:
    """The text of docs/crash-states.md."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    version = run("--version").split()[1]
    parts = {part: [r for r in results if r.cell.part == part] for part in (SIMULATED, REAL, STEPS, PEER, MUTANT)}
    return "\n".join(
        [
            _intro(today, version, command, seconds, results),
            _comparison(results),
            _operations(parts[REAL] + parts[STEPS]),
            _geometries("Real volumes, every geometry", REAL_TEXT, parts[REAL]),
            _geometries("Simulated volumes", SIMULATED_TEXT, parts[SIMULATED]),
            _mutants(parts[MUTANT]),
        ]
    )


def _intro(today: str, version: str, command: str, seconds: float, results: Sequence[Result]) -> str:
    found = wrong(results)
    verdict = "**no violation**" if not found else f"**{len(found)} violations**: {'; '.join(found[:20])}"
    return f"""# Crash states

What a power cut can leave, counted and judged. This page is written by the run itself, of {today} on libcryptsetup
{version}, in {seconds / 60:.0f} minutes:

```sh
{command}
```

{sum(r.cell.part != MUTANT for r in results)} enumerations, {sum(r.states for r in results if r.cell.part != MUTANT):,} crash states, {sum(r.reconciled for r in results):,} reconciles:
{verdict}.

The model is that of [the commit protocol](spec/commit-protocol.md): within the epoch (all writes between two flushes)
that is cut, each changed header sector is old, new or garbage, independently, and where it is written twice it may
hold the first content, too; so every prefix, subset, order and tear is in it. Key areas, of which only "intact or not"
can be seen, go through ten classes (nothing, all, all but the first or last sector, halves, every other one, torn,
garbage); so do header copies with more than five changed sectors. Equal states count once.
"""


def _comparison(results: Sequence[Result]) -> str:
    found = {(r.cell.part, r.cell.name): r for r in _plain(results)}
    chosen = [found[key] for key in COMPARED if key in found]
    if not chosen:
        return ""
    letters = "ABCDEFGHIJ"
    named = {REAL: "luksrotd", STEPS: "luksrotd --engine stepwise", PEER: ""}
    legend = [f"- **{letters[n]}** {f'{named[r.cell.part]} {r.cell.name}'.strip()}" for n, r in enumerate(chosen)]
    rows = [["writes", *(f"{r.writes}" for r in chosen)], ["bytes written", *(f"{r.bytes:,}" for r in chosen)],
            ["flushes", *(f"{r.flushes}" for r in chosen)], ["crash states", *(f"{r.states:,}" for r in chosen)]]  # fmt: skip
    rows += [[kind, *(str(r.before.get(kind, 0)) for r in chosen)] for kind in KINDS]
    rows += [[f"*after reconcile:* {kind}", *(str(r.after.get(kind, 0)) if r.cell.part != PEER else "" for r in chosen)]
             for kind in KINDS]  # fmt: skip
    return f"""## A new backup key in place of the old one, by whom

How many of the crash states have what wrong, after libcryptsetup's own recovery. An image with headers of 16 KiB, a
key of 512 bit, sectors of {chosen[0].cell.geometry.sector} bytes; all writes as the kernel was asked for them, those of A by the device that it
writes to, all others by strace.

{chr(10).join(legend)}

{_table(["", *letters[: len(chosen)]], rows)}

"Area of a key that never was in force": the new area of a rotation that was cut before its header; its salt was never
written, so it opens nothing ([ADR 7](adr/0007-wipe-and-ghosts.md)). "Two live pairs" of the stepwise engine carry
numbers that say which one is in force.
"""


def _operations(results: Sequence[Result]) -> str:
    rows = []
    for r in _plain(results):
        name = r.cell.name if r.cell.part == REAL else f"{r.cell.name}, stepwise"
        sizes = [str(r.writes), f"{r.bytes:,}", str(r.flushes), f"{r.states:,}", f"{r.reconciled:,}"]
        rows.append([name, *sizes, str(len(r.violations)), _kinds(r.before), _kinds(r.after)])
    header = ["operation", "writes", "bytes", "flushes", "states", "reconciled", "violations",
              "states in which a cut leaves something", "after reconcile"]  # fmt: skip
    return f"""## Each operation, before and after reconcile

On the same geometry, judged by real libcryptsetup: the main passphrase opens; by each valid copy alone, the header says
exactly what it said before the operation or what it says after it, and exactly the credentials of that side open;
libcryptsetup's recovery leads to one of the two, too. Then the real reconcile; the same again; a second reconcile
writes nothing; and every state in which the reconcile can be cut is judged likewise (depth 2; stepwise: depth 1, and it
may be in parts until it is reconciled). "Reconciled": different states; those whose 4 KiB blocks are old, new and torn
alike are reconciled once.

{_table(header, rows)}
"""


REAL_TEXT = """The same verdicts, depth 1, with other sizes of header and key, on images, loop devices and detached headers, each
recorded on the real ports. Crash states; a number of violations stands beside it if there are any. Larger headers: one
verb of each sequence of phases on every geometry, and every verb on one."""
SIMULATED_TEXT = """Judged by the invariants, each valid header copy alone, and by what it says as above; depth 2 (4 MiB: depth 1). Key
areas of 4 KiB."""


def _geometries(title: str, text: str, results: Sequence[Result]) -> str:
    lines = [f"## {title}", "", text, ""]
    for metadata in METADATA:
        here = [r for r in results if r.cell.geometry.metadata == metadata]
        columns = sorted({r.cell.geometry for r in here}, key=lambda g: (-g.bits, g.carrier, g.sector))
        if not here:
            continue
        names = [f"{g.carrier} {g.sector}" + (f", {g.bits} bit" if g.bits > 8 else "") for g in columns]
        there = {(r.cell.name, r.cell.geometry): r for r in here}
        rows = [[verb, *(_states(there.get((verb, column))) for column in columns)]
                for verb in VERBS if any((verb, column) in there for column in columns)]  # fmt: skip
        lines += [f"### Headers of {metadata} KiB", "", _table(["operation", *names], rows), ""]
    return "\n".join(lines)


def _mutants(results: Sequence[Result]) -> str:
    missed = [r.cell.name for r in results if r.violations]
    rows: dict[str, list[str]] = {}
    for r in results:
        verb, _, what = r.cell.name.rpartition(": ")
        rows.setdefault(verb or "operations in two commits", []).append(what)
    return f"""## What must be caught

Wrong protocols, each enumerated and judged like the right ones: {len(results)}, of which {len(results) - len(missed)} are
caught{", not: " + "; ".join(missed) if missed else ""}. Exchanging the two header copies is none of them: libcryptsetup takes
the newer one, whichever it is.

{_table(["operation", "mutants"], [[verb, "; ".join(whats)] for verb, whats in rows.items()])}
"""


def _plain(results: Sequence[Result]) -> list[Result]:
    """Those on the commonest geometry, with the smallest sectors that there are."""
    plain = [r for r in results if (r.cell.geometry.metadata, r.cell.geometry.bits) == (16, 512)]
    plain = [r for r in plain if r.cell.geometry.carrier == "image" and r.cell.part in (REAL, STEPS, PEER)]
    smallest = min((r.cell.geometry.sector for r in plain), default=0)
    return [r for r in plain if r.cell.geometry.sector == smallest]


def _states(result: Result | None) -> str:
    if result is None:
        return ""
    return f"{result.states:,}" + (f", **{len(result.violations)}**" if result.violations else "")


def _kinds(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{kind}: {counts[kind]}" for kind in KINDS if counts.get(kind)) or "nothing"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    ruler = ["---", *("--:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ruler, *rows))


def main(arguments: Sequence[str]) -> int:
    """Run the campaign, print how it goes, and write the page; 1 if there is anything wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.table", description=main.__doc__)
    parser.add_argument("--output", type=Path, default=PAGE, help="the page (default: docs/crash-states.md)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--small", action="store_true", help="a cell of each part, to try the generator")
    parser.add_argument("--full", action="store_true", help="every operation on every geometry: hours")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    chosen = list(cells(small=options.small, full=options.full))
    results = campaign(chosen, options.processes, lambda line: print(line, flush=True))
    flags = " --full" if options.full else " --small" if options.small else ""
    command = "make crash-table" if not flags else f"python -m tests.crash.table{flags}"
    options.output.write_text(page(results, command, time.monotonic() - begun), encoding="utf-8")
    found = wrong(results)
    for what in found:
        print(what, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
