# SPDX-License-Identifier: GPL-2.0-or-later
"""Keyslots that come without a token: noted, accepted, removed; and that inventories never get in the way."""

from datetime import UTC, datetime, timedelta

import pytest

from luksrotd.errors import InvalidRequest, LastKeyslot, StateError, WrongCredential
from luksrotd.rotation.reconcile import Action, Code
from tests.support import forge
from tests.support.simengine import UUID, make_volume, opened_by
from tests.support.simulation import MAIN, NEW, OLD, Simulation, run, secrets

STRAY = b"stray"
START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def simulation():
    """One passphrase, one managed key, and an inventory of them."""
    simulation = Simulation(make_volume([MAIN]))
    simulation.enroll(MAIN, OLD)
    assert simulation.reconcile().found == ()
    return simulation


@pytest.fixture
def strayed(simulation):
    """The same with a keyslot that another tool has leaked."""
    with_stray = Simulation(simulation.disk.content)
    with_stray.enroll(MAIN, STRAY, name="stray")
    image = forge.edited(with_stray.disk.content, lambda raw: raw["tokens"].pop("1"))
    simulation.disk.replace(0, image)
    return simulation


def remove(simulation, keyslot, unlock):
    with secrets(unlock=unlock) as sources:
        return run(simulation.volumes.suspects.remove(simulation.ref, keyslot, sources))


def accept(simulation, keyslot):
    run(simulation.volumes.suspects.accept(simulation.ref, keyslot))


def suspects(simulation):
    return [(one.keyslot, one.first_seen) for one in run(simulation.volumes.suspects.list(simulation.ref))]


def test_a_stray_keyslot_is_noted_by_reconcile_and_by_a_look(strayed):
    before = strayed.disk.content
    strayed.clock.advance(timedelta(days=3))
    done = strayed.reconcile()
    (note,) = done.left
    assert done.found == done.left
    assert (note.code, note.action, note.keyslots) == (Code.KEYSLOT_SUSPECT, Action.NOTE, (2,))
    assert note.since == "2026-01-04T00:00:00Z"
    assert not done.needs_person
    assert run(strayed.volumes.findings(strayed.ref)) == (note,)
    assert strayed.disk.content == before, "never by itself"


def test_its_age_counts_from_the_first_clean_reconcile_that_saw_it(strayed):
    strayed.clock.advance(timedelta(days=3))
    strayed.reconcile()
    strayed.clock.advance(timedelta(days=30))
    assert suspects(strayed) == [(2, START + timedelta(days=3))]
    assert strayed.reconcile().left[0].since == "2026-01-04T00:00:00Z"


def test_a_dry_run_and_a_look_remember_nothing(strayed):
    kept = dict(strayed.inventories.kept)
    strayed.reconcile(dry_run=True)
    run(strayed.volumes.findings(strayed.ref))
    suspects(strayed)
    assert strayed.inventories.kept == kept


def test_a_volume_that_needs_a_person_is_not_remembered(strayed):
    kept = dict(strayed.inventories.kept)
    strayed.probe.planted[strayed.disk.path] = ("ext4",)
    assert {finding.code for finding in strayed.reconcile().left} == {Code.FOREIGN_SIGNATURE, Code.KEYSLOT_SUSPECT}
    assert strayed.inventories.kept == kept


def test_a_volume_that_was_repaired_is(simulation):
    simulation.disk.replace(0, forge.keyslot_removed(simulation.disk.content, 1))
    simulation.reconcile()
    assert [entry.keyslot for entry in simulation.inventories.kept[UUID].entries] == [0]


def test_who_accepts_it_hears_no_more_of_it(strayed):
    strayed.reconcile()
    accept(strayed, 2)
    assert strayed.reconcile().found == ()
    assert suspects(strayed) == []
    assert "keyslot accepted" in strayed.journal.text()


def test_accepting_does_not_need_a_reconcile_before(strayed):
    accept(strayed, 2)
    assert strayed.reconcile().found == ()


def test_it_is_removed_when_another_way_in_has_been_shown(strayed):
    area = strayed.pair.winner.metadata.keyslots[2].area
    before = strayed.disk.content
    remove(strayed, 2, MAIN)
    assert opened_by(strayed.disk.content, STRAY) == []
    assert opened_by(strayed.disk.content, MAIN) == [0]
    assert opened_by(strayed.disk.content, OLD) == [1]
    assert strayed.disk.content[area.offset : area.end] != before[area.offset : area.end]
    assert strayed.reconcile().found == ()
    assert "keyslot removed" in strayed.journal.text()


@pytest.mark.parametrize(
    ("keyslot", "unlock", "refusal"),
    [
        (2, STRAY, LastKeyslot),
        (2, b"nothing", WrongCredential),
        (1, MAIN, InvalidRequest),
        (7, MAIN, InvalidRequest),
    ],
    ids=["itself", "no key", "ours", "none"],
)
def test_I5_what_must_not_be_removed(strayed, keyslot, unlock, refusal):
    before = strayed.disk.content
    with pytest.raises(refusal):
        remove(strayed, keyslot, unlock)
    assert strayed.disk.content == before


def test_I5_the_last_way_in_is_never_removed():
    alone = Simulation(make_volume([MAIN]))
    with pytest.raises(LastKeyslot):
        remove(alone, 0, MAIN)


@pytest.mark.parametrize("keyslot", [1, 7])
def test_only_a_keyslot_without_a_token_can_be_accepted(strayed, keyslot):
    with pytest.raises(InvalidRequest):
        accept(strayed, keyslot)


def test_a_state_directory_that_is_broken_is_a_note(simulation):
    simulation.inventories.broken = "Read-only file system"
    done = simulation.reconcile()
    assert {(note.code, note.action) for note in done.left} == {(Code.INVENTORY_UNAVAILABLE, Action.NOTE)}
    assert "Read-only file system" in done.left[0].message
    assert "Read-only file system" in simulation.journal.text()
    assert not done.needs_person
    assert run(simulation.volumes.findings(simulation.ref)) == ()
    with pytest.raises(StateError):
        accept(simulation, 0)
    with pytest.raises(StateError):
        suspects(simulation)


def test_a_repair_is_made_whatever_becomes_of_the_inventory(simulation):
    simulation.inventories.broken = "Permission denied"
    simulation.disk.replace(0, forge.keyslot_removed(simulation.disk.content, 1))
    assert [finding.code for finding in simulation.reconcile().repaired] == [Code.TOKEN_WITHOUT_KEYSLOT]


def test_a_rotation_makes_no_suspects(simulation):
    simulation.rotate(MAIN, NEW)
    assert simulation.reconcile().found == ()
    simulation.rotate(MAIN, OLD)
    assert simulation.reconcile().found == ()
