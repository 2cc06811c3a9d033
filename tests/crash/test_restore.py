# SPDX-License-Identifier: GPL-2.0-or-later
"""Every crash state of a header restore: at each instant, by each copy alone, all credentials of the volume open it, or
all of the backup: never a mix, and never none."""

import functools
from collections.abc import Callable, Sequence

import pytest

from luksrotd.luks2.pair import HeaderCopy, is_lost, parse_pair
from luksrotd.rotation.protocol import Phase
from luksrotd.service.headers import Headers
from tests.support import forge
from tests.support.crash import Enumeration, Epoch, merged, swapped
from tests.support.crashjudge import Judge, Scenario, judge_all, openers_of, record, scenario_of
from tests.support.simdisk import Write
from tests.support.simengine import make_volume, opened_by
from tests.support.simfiles import SimFiles
from tests.support.simulation import MAIN, NEW, OLD, Simulation, run

OTHER, THIRD = b"another passphrase", b"third key"
OVERLAP = "the key was rotated twice since: areas overlap"


def restore(simulation: Simulation, backup: bytes, *, force: bool = False) -> None:
    """As luksrotctl does it."""
    files = SimFiles()
    files.content["backup"] = backup
    headers = Headers(simulation.host, files)

    async def work() -> None:
        await headers.restore(simulation.ref, await headers.compare(simulation.ref, "backup", force=force))

    run(work())


def backed_up(volume: bytes) -> bytes:
    """As luksrotctl does it."""
    simulation, files = Simulation(volume), SimFiles()
    run(Headers(simulation.host, files).backup(simulation.ref, "backup"))
    return files.content["backup"]


@functools.cache
def enrolled() -> bytes:
    simulation = Simulation(make_volume([MAIN, OTHER], areas=8))
    simulation.enroll(MAIN, OLD, ref="vault/1")
    return simulation.disk.content


@functools.cache
def rotated() -> bytes:
    """The key of the backup was in what is free now."""
    simulation = Simulation(enrolled())
    simulation.rotate(MAIN, NEW, ref="vault/2")
    return simulation.disk.content


@functools.cache
def rotated_twice() -> bytes:
    """The key of the backup was where another one is now: first fit gives its space away."""
    simulation = Simulation(rotated(), seed=8)
    simulation.rotate(MAIN, THIRD, ref="vault/3")
    return simulation.disk.content


def with_another_token() -> bytes:
    return forge.edited(enrolled(), lambda raw: raw["tokens"].update({"5": {"type": "other", "keyslots": ["1"]}}))


def without_a_keyslot() -> bytes:
    """Another tool has removed keyslot 1, and overwritten its area."""
    image = forge.keyslot_removed(enrolled(), 1)
    area = forge.view_of(enrolled()).metadata.keyslots[1].area
    return forge.put(forge.newer(image, forge.BOTH), area.offset, b"\x5a" * area.size)


def damaged() -> bytes:
    """Somebody has overwritten the area of keyslot 1, which is listed still."""
    area = forge.view_of(enrolled()).metadata.keyslots[1].area
    return forge.put(enrolled(), area.offset, b"\x5a" * area.size)


def renumbered() -> bytes:
    """All keyslots anew since: the area of each is that of another key now."""
    image = make_volume([MAIN, b"replaced", b"and this one"], areas=8, seed=23)
    return forge.with_fields(image, seqid=40)


#: Of each the volume, and the backup to be restored.
CASES: dict[str, Callable[[], tuple[bytes, bytes]]] = {
    "only a token differs": lambda: (with_another_token(), enrolled()),
    "a keyslot was added since": lambda: (enrolled(), make_volume([MAIN, OTHER], areas=8)),
    "a keyslot was removed since": lambda: (without_a_keyslot(), enrolled()),
    "the key was rotated since": lambda: (rotated(), enrolled()),
    OVERLAP: lambda: (rotated_twice(), enrolled()),
    "another tool has replaced every key": lambda: (renumbered(), enrolled()),
    "a damaged keyslot": lambda: (damaged(), enrolled()),
    "forth again": lambda: (enrolled(), rotated_twice()),
}


@functools.cache
def scenario(name: str) -> Scenario:
    volume, backup = CASES[name]()
    return record(volume, lambda simulation: restore(simulation, backed_up(backup)))


@pytest.mark.parametrize("name", CASES)
def test_no_crash_state_of_a_restore_violates_an_invariant(name, report):
    judge = Judge(scenario(name), depth=2)
    assert judge_all(judge, scenario(name).enumeration()) == []
    report(f"simulated restore, {name}: {judge.states} crash states (depth 2), 0 violations")


@pytest.mark.parametrize("name", CASES)
def test_the_end_opens_by_what_the_backup_has(name):
    _, backup = CASES[name]()
    after = scenario(name).after
    for secret in (MAIN, OTHER, OLD, NEW, THIRD, b"replaced", b"and this one"):
        assert opened_by(after, secret) == opened_by(backup, secret), secret
    ours, theirs = forge.view_of(after), forge.view_of(backup)
    assert [key.token.generation for key in ours.keys] == [key.token.generation for key in theirs.keys]
    assert all(key.complete for key in ours.keys)
    assert ours.pending == ()


def test_the_epochs_are_the_phases_in_their_order():
    done = scenario(OVERLAP)
    size = parse_pair(done.before).hdr_size
    (now,) = (parse_pair(done.before).winner.metadata.keyslots[2].area,)
    places = [[write.offset for write in epoch] for epoch in done.epochs]
    assert len(places) == len(Phase)
    assert places[1:] == [[0], [size], [now.offset], [0], [size]]
    assert places[0] != [now.offset], "the backup's key lay there"


def test_a_keyslot_that_is_there_is_not_written():
    writes = [write.offset for epoch in scenario("only a token differs").epochs for write in epoch]
    assert writes == [0, 16384]


def test_a_lost_header_comes_back_whole_or_not_at_all(report):
    """By each copy alone; a device that has still none can be given it again, another one can be healed."""
    backup = backed_up(enrolled())
    size = 2 * parse_pair(backup).hdr_size
    lost = forge.put(rotated_twice(), 0, bytes(size))
    simulation = Simulation(lost)
    restore(simulation, backup, force=True)
    enumeration = Enumeration(lost, simulation.disk.epochs()[:-1], size)
    whole = {opener_of(backup, copy) for copy in parse_pair(backup).valid}
    count = healed = 0
    for image in enumeration.images():
        count += 1
        content = bytes(image)
        again = Simulation(content)
        if is_lost(image.read, len(image)):
            restore(again, backup, force=True)
        else:
            healed += 1
            assert {opener_of(content, copy) for copy in parse_pair(content).valid} == whole
            assert again.reconcile().left == ()
        assert again.pair.agree
        assert opener_of(again.disk.content, again.pair.winner) in whole
    assert 0 < healed < count
    report(f"simulated restore of a lost header: {count} crash states, {healed} with a header, 0 violations")


def opener_of(image: bytes, copy: HeaderCopy) -> frozenset:
    return frozenset(openers_of(image, copy).items())


# ---- what the judge must see

MUTANTS = {
    "areas behind the first header": lambda epochs: swapped(epochs, 0),
    "areas and first header in one epoch": lambda epochs: merged(epochs, 0),
    "both headers in one epoch": lambda epochs: merged(epochs, 1),
    "the wipe before the second header": lambda epochs: swapped(epochs, 2),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(name):
    done = scenario(OVERLAP)
    assert caught(done, MUTANTS[name](done.epochs))


@pytest.mark.parametrize("flushes", [True, False], ids=["ordered", "as cryptsetup does it"])
def test_a_restore_in_place_is_caught(flushes):
    """Without relocation, and its end is what a restore should come to: it is the way there that is wrong."""
    volume, backup = CASES[OVERLAP]()
    size = parse_pair(backup).hdr_size
    raised = forge.with_fields(backup, seqid=90)
    areas = [Write(area.offset, backup[area.offset : area.end]) for area in parse_pair(backup).referenced]
    headers = [Write(0, raised[:size]), Write(size, raised[size : 2 * size])]
    epochs = [areas, headers[:1], headers[1:]] if flushes else [[*areas, *headers]]
    after = bytes(scenario(OVERLAP).enumeration(epochs).starts[-1])
    assert caught(scenario_of(volume, epochs, after), epochs)


def caught(done: Scenario, epochs: Sequence[Epoch]) -> bool:
    """Whether a state is found to be wrong, not only a write to be misplaced."""
    judge = Judge(done)
    return any(judge.violations(image) for image in done.enumeration(epochs).images())


def test_a_restore_that_leaves_what_it_replaces_is_caught():
    done = scenario(OVERLAP)
    kept = done.enumeration([*done.epochs[:3], *done.epochs[4:]])
    assert Judge(done).finished(kept.starts[-1]) != []
    assert Judge(done).finished(done.after) == []
