# SPDX-License-Identifier: GPL-2.0-or-later
"""Any rotation or enrolment of any small volume, stopped anywhere, keeps the invariants."""

from hypothesis import given, settings
from hypothesis import strategies as st

from luksrotd.luks2.areas import Extent
from luksrotd.rotation import keys, reconcile
from luksrotd.rotation.change import Change
from luksrotd.rotation.invariants import Expectation, check_done, check_instant, foreign_parts, opener
from luksrotd.rotation.lineage import lineage
from luksrotd.rotation.protocol import CommitPlan, Phase
from tests.support import forge
from tests.support.planning import ENROLL, KEEP, ROTATE, after, instants, planned
from tests.support.simengine import HDR_SIZE, make_volume, opened_by

#: An example is a whole rotation: fewer of them, unless a profile asks for many.
few = settings(max_examples=max(25, settings().max_examples // 4))
HEADERS = Extent(0, 2 * HDR_SIZE)


@st.composite
def volumes(draw):
    """A volume with some foreign keyslots and tokens, with our key on one of the keyslots or without it."""
    slots = draw(st.integers(2, 5))
    secrets = [KEEP, *(b"secret %d" % number for number in range(1, slots))]
    image = make_volume(secrets, areas=draw(st.integers(slots + 1, 9)), seed=draw(st.integers(0, 9)))
    for gone in draw(st.sets(st.integers(2, 4), max_size=2)):
        if gone < slots:
            image = forge.keyslot_removed(image, gone)
    if draw(st.booleans()):
        image = forge.edited(image, lambda raw: raw["tokens"].update({"0": {"type": "x", "keyslots": ["0"]}}))
    if draw(st.booleans()):
        image = forge.with_token(image, 1, draw(st.integers(1, 31)), generation=draw(st.integers(1, 99)))
    return image


def changed(image: bytes) -> tuple[Change, CommitPlan]:
    seen = forge.view_of(image)
    change = keys.rotate(seen, ROTATE) if seen.keys else keys.enroll(seen, ENROLL)
    return change, planned(image, change)


def reader(image: bytes):
    return lambda offset, size: image[offset : offset + size]


def expectation(image: bytes, done: bytes) -> Expectation:
    def ours(state: bytes):
        return {
            key.token.generation: opener(key.keyslot, reader(state))
            for key in forge.view_of(state).keys
            if key.keyslot is not None
        }

    def standing(state: bytes):
        line = lineage(forge.view_of(state), "backup")
        return tuple(key.token.generation if key else 0 for key in (line.current, line.staged))

    claimed = {key.token.keyslots[0] for key in forge.view_of(image).keys}
    slots = forge.pair_of(image).winner.metadata.keyslots
    return Expectation(
        keep={f"keyslot {n}": opener(slot, reader(image)) for n, slot in slots.items() if n not in claimed},
        keys={"backup": ours(image) | ours(done)},
        allowed={"backup": frozenset({standing(image), standing(done)})},
        foreign=(foreign_parts(forge.pair_of(image).winner),),
    )


@few
@given(volumes())
def test_I4_every_write_is_in_the_headers_or_in_space_that_nothing_references_then(image):
    _, plan = changed(image)
    before, space = forge.pair_of(image), forge.view_of(image).metadata.keyslots_area
    committed = forge.pair_of(forge.put(image, 0, plan.committed))
    for step in plan.steps:
        for write in step.writes:
            if step.phase is Phase.NEW_AREA:
                assert space.contains(write.extent)
                assert not any(write.extent.overlaps(area) for area in before.referenced)
            elif step.phase is Phase.WIPE_OLD:
                assert write.extent in before.referenced
                assert not any(write.extent.overlaps(area) for area in committed.referenced)
            else:
                assert HEADERS.contains(write.extent)


@few
@given(volumes(), st.randoms(use_true_random=False))
def test_I1_I2_I3_I5_at_every_instant_with_half_a_step_written_too(image, choose):
    _, plan = changed(image)
    expected = expectation(image, after(image, plan))
    previous = image
    for _, state in instants(image, plan):
        assert check_instant(forge.pair_of(state), reader(state), expected) == ()
        # Some of the sectors of the step have reached the disk, in any order.
        torn = bytearray(previous)
        for sector in range(0, len(state), 512):
            if state[sector : sector + 512] != previous[sector : sector + 512] and choose.random() < 0.5:
                torn[sector : sector + 512] = state[sector : sector + 512]
        assert check_instant(forge.pair_of(bytes(torn)), reader(torn), expected) == ()
        previous = state


@few
@given(volumes())
def test_I6_after_success_the_old_secret_is_gone_and_nothing_is_left_to_do(image):
    old = [key.keyslot for key in forge.view_of(image).keys if key.keyslot]
    _, plan = changed(image)
    done = after(image, plan)
    gone = [opener(slot, reader(image)) for slot in old]
    retired = {slot.area: opener(slot, reader(image)).material for slot in old}
    assert check_done(forge.pair_of(done), reader(done), gone, retired) == ()
    assert reconcile.diagnose(forge.view_of(done)) == ()
    assert opened_by(done, KEEP) == [0]


@few
@given(volumes())
def test_I7_a_wipe_that_did_not_happen_is_made_up_for(image):
    _, plan = changed(image)
    stopped = image
    for phase, state in instants(image, plan):
        if phase is Phase.HEADER_SECONDARY:
            stopped = state
    change = reconcile.repair(forge.view_of(stopped))
    assert (change is not None) == bool(forge.view_of(stopped).pending)
    if change is not None:
        mended = after(stopped, planned(stopped, change))
        assert reconcile.repair(forge.view_of(mended)) is None
        assert forge.json_of(mended) == forge.json_of(after(image, plan))
