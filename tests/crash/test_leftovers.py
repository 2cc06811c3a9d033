# SPDX-License-Identifier: GPL-2.0-or-later
"""What other tools leave behind is seen for what it is, and so is every fault that is planted into a good volume."""

import pytest

from luksrotd.luks2.layout import Which
from tests.support import forge
from tests.support.crash import Image
from tests.support.crashverbs import SECRETS
from tests.support.examination import Examiner
from tests.support.forge import Json
from tests.support.leftovers import Classifier, Leftover, tally
from tests.support.oracle import Libcryptsetup
from tests.support.peers import PEERS, observed
from tests.support.realvolume import Geometry, Recorded, prepared, recorded
from tests.support.simdisk import Write

COARSE = Geometry(sector=4096)


@pytest.fixture(scope="module")
def rotation() -> Recorded:
    return recorded("rotation", COARSE)


def keyslot_of(image: bytes) -> int:
    return next(key.keyslot.id for key in forge.view_of(image).keys if key.keyslot is not None)


def area_of(image: bytes) -> slice:
    area = forge.view_of(image).metadata.keyslots[keyslot_of(image)].area
    return slice(area.offset, area.end)


def leaked(done: Recorded) -> bytes:
    return forge.edited(done.after, lambda raw: raw["tokens"].clear())


def dangling(done: Recorded) -> bytes:
    return forge.keyslot_removed(done.after, keyslot_of(done.after))


def dead(done: Recorded) -> bytes:
    area = area_of(done.after)
    return forge.put(done.after, area.start, b"\x5a" * 512)


def other_key(done: Recorded) -> bytes:
    """The token of before, on the keyslot of after."""
    token = {**forge.json_of(done.before)["tokens"]["0"], "keyslots": [str(keyslot_of(done.after))]}
    return forge.edited(done.after, lambda raw: raw["tokens"].update({"0": token}))


def intact(done: Recorded) -> bytes:
    area = area_of(done.before)
    return forge.put(done.after, area.start, done.before[area])


def ghost(done: Recorded) -> bytes:
    area = area_of(done.after)
    return forge.put(done.before, area.start, done.after[area])


def two_pairs(done: Recorded) -> bytes:
    """The old pair is there again, beside the new one."""
    old, slot = forge.json_of(done.before), str(keyslot_of(done.before))

    def edit(raw: Json) -> None:
        raw["keyslots"][slot] = old["keyslots"][slot]
        raw["digests"]["0"]["keyslots"].append(slot)
        raw["tokens"]["7"] = old["tokens"]["0"]

    return forge.edited(intact(done), edit)


def lost(done: Recorded) -> bytes:
    return forge.unsealed(forge.unsealed(done.after, Which.PRIMARY), Which.SECONDARY)


def locked(done: Recorded) -> bytes:
    """The main passphrase opens no more."""
    return forge.put(done.after, forge.view_of(done.after).metadata.keyslots[0].area.offset, b"\x5a" * 512)


PLANTED = {
    leaked: {Leftover.LEAKED, Leftover.NO_BACKUP},
    dangling: {Leftover.DANGLING, Leftover.NO_BACKUP, Leftover.GHOST},
    dead: {Leftover.DEAD, Leftover.NO_BACKUP},
    other_key: {Leftover.OTHER_KEY, Leftover.NO_BACKUP},
    intact: {Leftover.INTACT},
    ghost: {Leftover.GHOST},
    two_pairs: {Leftover.TWO_PAIRS},
    lost: {Leftover.LOST},
    locked: {Leftover.LOST, Leftover.DEAD},
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_seen(plant, rotation):
    found = classified(rotation, plant(rotation))
    assert {kind for kind, _ in found} == PLANTED[plant]


def test_a_volume_in_order_has_nothing(rotation):
    assert classified(rotation, rotation.before) == classified(rotation, rotation.after) == frozenset()


def classified(done: Recorded, image: bytes) -> frozenset:
    sectors = {n: image[n * 4096 : (n + 1) * 4096] for n in range(len(image) // 4096)}
    before, after = (done.enumeration().starts[place] for place in (0, -1))
    with Libcryptsetup(done.before, done.geometry.headers, SECRETS) as tool:
        # As a peer's: an end that is not in order is counted.
        return Classifier(tool, before, after, intended=False).classify(Image(done.before, 4096, sectors))


#: What each of the peers leaves in some state of a cut.
LEAVE = {
    "cryptsetup luksAddKey, token import, luksKillSlot, token remove": {
        Leftover.LEAKED, Leftover.TWO_PAIRS, Leftover.DANGLING, Leftover.DEAD, Leftover.GHOST,
    },
    "cryptsetup luksChangeKey": {Leftover.OTHER_KEY, Leftover.TWO_PAIRS, Leftover.DEAD, Leftover.GHOST},
    "cryptsetup luksChangeKey, token import": {
        Leftover.OTHER_KEY, Leftover.TWO_PAIRS, Leftover.DEAD, Leftover.GHOST, Leftover.NO_BACKUP,
    },
    "systemd-cryptenroll --recovery-key --wipe-slot": {
        Leftover.LEAKED, Leftover.TWO_PAIRS, Leftover.DANGLING, Leftover.DEAD, Leftover.GHOST,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PEERS)
def test_what_other_tools_leave(name, report):
    seen = observed(name, COARSE)
    enumeration = seen.recorded.enumeration()
    with Libcryptsetup(seen.recorded.before, COARSE.headers, seen.secrets) as tool:
        classifier = Classifier(tool, enumeration.starts[0], enumeration.starts[-1], intended=False)
        counted = tally(classifier, enumeration.images())
    assert set(counted.found) == LEAVE[name]
    found = ", ".join(f"{kind}: {count}" for kind, count in counted.found.items())
    report(f"{name}, 4096-byte sectors: {counted.states} crash states; {found}")


def test_the_stepwise_engine_leaves_what_reconcile_can_tell(report):
    """In between it is in parts, which reconcile ends (test_stepwise.py); but nothing leaks, and no token lies."""
    seen = observed("stepwise rotation", COARSE)
    found = Examiner(seen.secrets, atomic=False, reconcile=False).examine(seen.recorded)
    never = {Leftover.LOST, Leftover.NO_BACKUP, Leftover.LEAKED, Leftover.OTHER_KEY, Leftover.INTACT}
    assert not never & set(found.before.found)
    assert found.before.found[Leftover.TWO_PAIRS] > 0
    report(f"stepwise rotation, 4096-byte sectors: {found.states} crash states, no leak in any")


@pytest.mark.parametrize("verb", ["rotation", "staging", "removal"])
def test_a_cut_of_ours_leaves_nothing_but_ghosts(verb):
    found = Examiner(SECRETS, reconcile=False).examine(recorded(verb, COARSE))
    assert found.violations == []
    assert set(found.before.found) <= {Leftover.GHOST}


def test_an_atomic_operation_in_parts_is_a_violation():
    """The examination that all real operations go through is not blind: here one of two headers has no token."""
    before = prepared("removal", sector=4096)
    done = recorded("removal", COARSE)
    without = forge.newer(forge.edited(before, lambda raw: raw["tokens"].clear()), forge.BOTH)
    size = COARSE.headers // 2
    extra = [[Write(0, without[:size])], [Write(size, without[size : 2 * size])]]
    parts = Recorded(COARSE, before, [*extra, *done.epochs], done.after)
    found = Examiner(SECRETS, reconcile=False).examine(parts)
    assert any("neither what was before nor what is after" in what for what in found.violations)
    assert found.before.found[Leftover.LEAKED] > 0
