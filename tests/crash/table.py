# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole crash campaign, and docs/crash-states.md from it: ``make crash-table``, or ``python -m tests.crash.table``.

Fixed seeds, no clock in what is examined: two runs on one version of libcryptsetup differ by salts and keys alone.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.crash.cells import MUTANT, Cell, Result, cells, work
from tests.crash.page import page, wrong

PAGE = Path(__file__).parents[2] / "docs" / "crash-states.md"


def say(line: str) -> None:
    """To the person who waits."""
    print(line, flush=True)  # noqa: T201 - a command of its own


def campaign(chosen: Sequence[Cell], processes: int, tell: Callable[[str], None]) -> list[Result]:
    """All cells, in as many processes; in the order of ``chosen``."""
    results: dict[Cell, Result] = {}
    # Spawned: libcryptsetup has threads and process-wide state that a fork would share.  Not a ProcessPoolExecutor: in
    # Python 3.11 one that replaces its processes stops for ever (python/cpython#115634).
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=40) as pool:
        for result in pool.imap_unordered(work, chosen):
            cell = result.cell
            results[cell] = result
            trouble = f", {len(result.violations)} VIOLATIONS: {result.violations[0]}" if result.violations else ""
            where = "" if cell.part == MUTANT else f" [{cell.geometry}]"
            tell(f"{len(results)}/{len(chosen)} {cell.part} {cell.name}{where}: {result.states} states"
                 f"{trouble} ({result.seconds:.1f} s)")  # fmt: skip
    return [results[cell] for cell in chosen]


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
    results = campaign(chosen, options.processes, say)
    flags = " --full" if options.full else " --small" if options.small else ""
    command = "make crash-table" if not flags else f"python -m tests.crash.table{flags}"
    options.output.write_text(page(results, command, time.monotonic() - begun), encoding="utf-8")
    found = wrong(results)
    for what in found:
        say(what)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
