# SPDX-License-Identifier: GPL-2.0-or-later
"""The generator of docs/crash-states.md, on a few cells."""

import pytest

from tests.crash import table
from tests.crash.cells import MUTANT, PEER, REAL, SIMULATED, STEPS, Cell, Result, cells, examined, work
from tests.crash.page import page, wrong
from tests.support.crashverbs import SECRETS, VERBS
from tests.support.examination import Examiner
from tests.support.leftovers import Leftover
from tests.support.peers import PEERS, STEPWISE
from tests.support.realvolume import Geometry, Recorded, recorded


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "page.md"
    assert table.main(["--small", "--processes", "2", "--output", str(path)]) == 0
    return path.read_text()


def test_the_page_says_what_was_found(results):
    assert "**no violation**" in results
    assert "| keyslot without a token | 0 | 0 |" in results
    changed = next(line for line in results.splitlines() if line.startswith("| token that describes another key"))
    assert int(changed.split("|")[3]) > 0, "luksChangeKey"
    assert "| *after reconcile:* two live pairs | 0 |" in results
    for name in ("other associated data", "removal, stepwise", "flush after area dropped"):
        assert name in results


def test_the_campaign_leaves_nothing_out():
    chosen = list(cells())
    assert len(chosen) == len(set(chosen))
    geometries = {(c.name, c.geometry) for c in chosen if c.part == REAL}
    every = {Geometry(16, bits, sector, carrier) for bits, sector in ((512, 512), (512, 4096), (256, 4096))
             for carrier in ("image", "loop", "detached")}  # fmt: skip
    assert {(verb, geometry) for verb in VERBS for geometry in every} <= geometries
    assert {(verb, metadata) for verb in VERBS for metadata in (16, 64, 4096)} <= {
        (name, geometry.metadata) for name, geometry in geometries
    }
    names = {part: {c.name for c in chosen if c.part == part} for part in (SIMULATED, STEPS, PEER)}
    assert names == {SIMULATED: set(VERBS), STEPS: set(STEPWISE), PEER: set(PEERS)}


def test_what_is_wrong_is_said_and_counted():
    cell = Cell(REAL, "rotation")
    bad = Result(cell, 7, violations=["lost"], after={str(Leftover.LEAKED): 2, str(Leftover.GHOST): 3})
    assert len(wrong([bad])) == 2
    text = page([bad, Result(Cell(MUTANT, "rotation: x"), 1, violations=["the mutant survives"])], "command", 60)
    assert "**no violation**" not in text
    assert "**3 violations**" in text
    assert "not: rotation: x" in text
    assert "| 7, **1** |" in text


def test_a_cell_with_a_wrong_protocol_is_wrong():
    """A mutant in place of the verb: what the campaign runs must see it."""
    good = recorded("other associated data", Geometry(sector=4096))
    one = [write for epoch in good.epochs for write in epoch]
    torn = Recorded(good.geometry, good.before, [one], good.after)
    found = examined(Cell(REAL, "x"), torn, Examiner(SECRETS, reconcile=False))
    assert wrong([found]) != []


def test_work_gives_every_part():
    found = [work(cell) for cell in cells(small=True) if cell.part in (SIMULATED, MUTANT)]
    assert [result.violations for result in found] == [[]] * len(found)
    assert all(result.seconds > 0 for result in found)
