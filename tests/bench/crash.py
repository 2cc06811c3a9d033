# SPDX-License-Identifier: GPL-2.0-or-later
"""12: how quickly the crash states of a rotation are judged."""

import asyncio
import time
from typing import Final

from tests.bench.figures import Finding, Result, Series
from tests.crash.cells import MUTANT, REAL, SIMULATED, Cell, cells
from tests.crash.table import campaign

CORES: Final = 2
LIMIT: Final = 30.0
METHOD: Final = f"""The enumeration for one rotation, in {CORES} processes that are started for it: on simulated
volumes with both sizes of sectors (crashes in reconcile too); by real libcryptsetup with headers of 16 KiB and a key
of 512 bit, on images, loop devices and detached headers, with both sizes of sectors; and every mutant of the protocol,
which must be caught. A state is one that differs from all others. A violation ends the measurement. Time is from the
start of the processes to their end, the making of the volumes included."""


def suite() -> list[Cell]:
    """The cells for a rotation on the plain geometry, and all mutants."""
    return [cell for cell in cells() if cell.part == MUTANT or _plain(cell)]


def _plain(cell: Cell) -> bool:
    geometry = cell.geometry
    plain = geometry.metadata == 16 and (cell.part == SIMULATED or geometry.bits == 512)
    return cell.part in (SIMULATED, REAL) and cell.name == "rotation" and plain


async def judged(rounds: int) -> Result:
    """12."""
    seconds, rates = [], []
    for _ in range(rounds):
        begun = time.perf_counter()
        results = await asyncio.to_thread(campaign, suite(), CORES, lambda line: None)
        took = time.perf_counter() - begun
        if wrong := [violation for result in results for violation in result.violations]:
            raise RuntimeError(f"crash states are wrong: {wrong[0]}")
        seconds.append(took)
        rates.append(sum(result.states for result in results if result.cell.part != MUTANT) / took)
    whole = Series("whole suite for a rotation", "s", tuple(seconds))
    rate = Series("crash states judged", "states/s", tuple(rates))
    return Result(
        12, "Crash states", METHOD, [whole, rate], (), [Finding("whole suite, most", whole.maximum, LIMIT, "s")]
    )
