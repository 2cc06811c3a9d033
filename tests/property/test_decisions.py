# SPDX-License-Identifier: GPL-2.0-or-later
"""Every decision on any small volume: planned and stopped anywhere, it keeps the invariants."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from luksrotd.errors import RefusedError, RequestError
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import Which
from luksrotd.luks2.pair import Pair
from luksrotd.rotation import adoption, keys, policy, reconcile, staging
from luksrotd.rotation.adoption import AdoptRequest, RecreateRequest
from luksrotd.rotation.change import Change
from luksrotd.rotation.draft import Draft
from luksrotd.rotation.edits import NEW, PBKDF_FOR_RANDOM_KEYS
from luksrotd.rotation.invariants import (
    Expectation,
    Opener,
    check_done,
    check_instant,
    check_sequence,
    check_write,
    foreign_parts,
    opener,
)
from luksrotd.rotation.leftovers import Rules
from luksrotd.rotation.lineage import lineage
from luksrotd.rotation.preview import preview
from luksrotd.rotation.staging import StageRequest
from luksrotd.rotation.view import DeviceView, view
from tests.support import forge
from tests.support.planning import ENROLL, FRESH, KEEP, NOW, ROTATE, after, instants, planned
from tests.support.schema import Schema
from tests.support.simengine import make_volume, opened_by

#: An example is a whole transaction: fewer of them, unless a profile asks for many.
few = settings(max_examples=max(30, settings().max_examples // 3))
CRASH_ONLY = Rules(orphans=False)
SCHEMA = Schema.of_tokens()
NOTE = {"type": "note", "keyslots": []}
DATA = {"ref": "vault/9"}

Decision = Callable[[DeviceView], Change]
#: What there can be of a key on keyslot 1 (and 2): members of its tokens, in their order.
KEYS: Mapping[str, list[dict[str, object]]] = {
    "none": [],
    "active": [{"generation": 4}],
    "adopted": [{"adopted": {"type": "systemd-recovery", "keyslots": ["1"], "x": 1}}],
    "staged": [{"generation": 4}, {"generation": 5, "state": "staged", "expires_at": "2026-04-03T05:06:07Z"}],
    "only staged": [{"generation": 5, "state": "staged"}],
    "orphaned": [{"generation": 4, "keyslots": []}],
    "changed": [{"generation": 4, "fingerprint": "sha256:" + "0" * 64}],
}


@st.composite
def volumes(draw: st.DrawFn) -> bytes:
    """Keyslot 0 is an administrator's; there may be a key in any state, and more keyslots and tokens of others."""
    slots = draw(st.integers(3, 6))
    secrets = [KEEP, *(b"secret %d" % number for number in range(1, slots))]
    image = make_volume(secrets, areas=draw(st.integers(slots, slots + 3)), seed=draw(st.integers(0, 9)))
    for gone in sorted(draw(st.sets(st.integers(3, 4), max_size=2))):
        if gone < slots:
            image = forge.keyslot_removed(image, gone)
    numbers = draw(st.lists(st.integers(0, 31), min_size=4, max_size=4, unique=True))
    for number, names in zip(numbers, draw(st.lists(st.sampled_from([[], ["0"]]), max_size=2)), strict=False):
        image = with_note(image, number, names)
    for at, members in enumerate(KEYS[draw(st.sampled_from(sorted(KEYS)))]):
        image = forge.with_token(image, 1 + at, numbers[2 + at], **members)
    return image


def with_note(image: bytes, number: int, names: list[str]) -> bytes:
    return forge.edited(image, lambda raw: raw["tokens"].update({str(number): {**NOTE, "keyslots": names}}))


@st.composite
def mixes(draw: st.DrawFn, seen: DeviceView) -> Decision:
    """Keyslots and tokens come and go in one draft."""
    adds = draw(st.integers(0, 2))
    notes = draw(st.lists(st.booleans(), max_size=2))
    slots = draw(st.sets(st.sampled_from(sorted(seen.metadata.keyslots)), max_size=2))
    gone = draw(st.sets(st.sampled_from(sorted(seen.metadata.tokens) or [31]), max_size=2))

    def decide(again: DeviceView) -> Change:
        draft = Draft(again)
        added = [draft.add_keyslot(NEW, PBKDF_FOR_RANDOM_KEYS) for _ in range(adds)]
        for named in notes:
            draft.set_token({**NOTE, "keyslots": [str(number) for number in added] if named else []})
        for keyslot in slots:
            draft.destroy_keyslot(keyslot)
            for key in again.keys:  # or it would nearly always be refused
                if keyslot in key.token.keyslots:
                    draft.remove_token(key.token.id)
        for token in gone:
            draft.remove_token(token)
        return draft.change()

    return decide


def decisions(mix: Decision) -> Mapping[str, Decision]:
    recreate = RecreateRequest(DATA, NOW, PBKDF_FOR_RANDOM_KEYS)
    return {
        "enroll": lambda seen: keys.enroll(seen, replace(ENROLL, name="backup" if not seen.keys else "spare")),
        "rotate": lambda seen: keys.rotate(seen, ROTATE),
        "stage": lambda seen: staging.stage(seen, StageRequest(ROTATE)),
        "finish": lambda seen: staging.finish(seen, "backup"),
        "abort": lambda seen: staging.abort(seen, "backup"),
        "remove": lambda seen: keys.remove(seen, "backup"),
        "set data": lambda seen: keys.set_data(seen, "backup", DATA),
        "adopt": lambda seen: adoption.adopt(seen, AdoptRequest(3, DATA, NOW, "third")),
        "adopt the first": lambda seen: adoption.adopt(seen, AdoptRequest(0, DATA, NOW, "first")),
        "release": lambda seen: adoption.release(seen, "backup"),
        "recreate": lambda seen: adoption.recreate(seen, recreate),
        "recreate the token": lambda seen: adoption.recreate(seen, replace(recreate, keyslot=1)),
        "draft": mix,
    }


class Case:
    """One decision that is not refused."""

    def __init__(self, image: bytes, change: Change) -> None:
        self.image = image
        self.change = change
        self.plan = planned(image, change)
        self.done = after(image, self.plan)

    def __repr__(self) -> str:
        return f"Case({self.change})"  # an image is too much to read


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A volume, and one of the decisions that are possible on it."""
    image = draw(volumes())
    seen = forge.view_of(image)
    possible = {}
    for name, decide in decisions(draw(mixes(seen))).items():
        try:
            change = decide(seen)
            policy.check_retirement(seen, change)
        except (RefusedError, RequestError):  # anything else is a defect
            continue
        possible[name] = change
    if not possible:  # no room for anything
        image = make_volume([KEEP, b"secret 1"])
        possible["enroll"] = keys.enroll(forge.view_of(image), ENROLL)
    change = possible[draw(st.sampled_from(sorted(possible)))]
    return Case(image, change)


def reader(image: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, size: image[offset : offset + size]


def openers(image: bytes) -> dict[int, Opener]:
    return {number: opener(slot, reader(image)) for number, slot in forge.view_of(image).metadata.keyslots.items()}


def expectation(image: bytes, done: bytes) -> Expectation:
    """What opens before and after opens always; the keys are what they were or what they will be."""
    states = [(forge.view_of(state), openers(state)) for state in (image, done)]
    names = {key.token.name for seen, _ in states for key in seen.keys}
    generations: dict[str, dict[int, Opener]] = {name: {} for name in names}
    for seen, found in states:
        for key in seen.keys:
            if key.keyslot is not None:
                generations[key.token.name][key.token.generation] = found[key.keyslot.id]

    def standing(seen: DeviceView, name: str) -> tuple[int, int]:
        line = lineage(seen, name)
        current, staged = (key.token.generation if key else 0 for key in (line.current, line.staged))
        return current, staged

    return Expectation(
        keep={f"keyslot {n}": found for n, found in states[0][1].items() if found in states[1][1].values()},
        keys=generations,
        allowed={name: frozenset(standing(seen, name) for seen, _ in states) for name in names},
        foreign=tuple(foreign_parts(seen.pair.winner) for seen, _ in states),
        alone=frozenset(found[number] for seen, found in states for number in seen.ordinary),
        orphaned=frozenset(
            (key.token.name, key.token.generation) for key in states[0][0].keys if not key.token.keyslots
        ),
    )


@few
@given(cases(), st.randoms(use_true_random=False))
def test_I1_I2_I3_I5_I9_at_every_instant_with_half_a_step_written_too(case, choose):
    expected = expectation(case.image, case.done)
    before = forge.pair_of(case.image)
    previous = case.image
    for _, state in instants(case.image, case.plan):
        # Some of the sectors of the step have reached the disk, in any order.
        torn = bytearray(previous)
        for sector in range(0, len(state), 512):
            if state[sector : sector + 512] != previous[sector : sector + 512] and choose.random() < 0.5:
                torn[sector : sector + 512] = state[sector : sector + 512]
        for there in (state, bytes(torn)):
            pair = forge.pair_of(there)
            assert check_instant(pair, reader(there), expected) == ()
            assert check_sequence(before, pair, changed=False) == ()
        previous = state
    assert check_sequence(before, forge.pair_of(case.done), changed=True) == ()


@few
@given(cases())
def test_I4_no_write_touches_what_a_copy_references_then(case):
    state = case.image
    for write in case.plan.writes:
        assert check_write(forge.pair_of(state), write.extent) == ()
        state = forge.put(state, write.offset, write.data)


@few
@given(cases())
def test_I6_after_success_what_goes_is_gone_and_nothing_is_left_to_do(case):
    first, last = openers(case.image), openers(case.done)
    gone = set(first.values()) - set(last.values())
    assert len(gone) == len(case.change.destroyed)
    retired = {}
    for area in case.change.retired(forge.view_of(case.image).metadata):
        retired[area] = hashlib.sha256(case.image[area.offset : area.end]).hexdigest()
    assert check_done(forge.pair_of(case.done), reader(case.done), gone, retired) == ()
    assert not any(token["type"] == "luksrotd-wipe" for token in forge.json_of(case.done)["tokens"].values())
    assert len(opened_by(case.done, FRESH)) == len(case.change.added)


@few
@given(cases())
def test_I6_as_long_as_a_retired_key_is_there_every_copy_names_it(case):
    retired = case.change.retired(forge.view_of(case.image).metadata)
    for _, state in instants(case.image, case.plan):
        for copy in forge.pair_of(state).valid:
            alone = view(Pair(copy, copy, state[: 2 * copy.header.hdr_size]))
            for area in retired:
                intact = state[area.offset : area.end] == case.image[area.offset : area.end]
                assert not intact or area in (*copy.metadata.areas, *alone.pending)


@few
@given(cases())
def test_I7_a_wipe_that_did_not_happen_is_made_up_for(case):
    for _, stopped in instants(case.image, case.plan):
        seen = forge.view_of(stopped)
        if not seen.pair.agree or not seen.pending:
            continue
        change = reconcile.repair(seen, CRASH_ONLY)
        assert change is not None
        mended = after(stopped, planned(stopped, change))
        assert forge.json_of(mended) == forge.json_of(case.done)
        assert not reconcile.repair(forge.view_of(mended), CRASH_ONLY)


@few
@given(cases())
def test_every_token_of_ours_is_at_every_instant_as_the_schema_says(case):
    for _, state in instants(case.image, case.plan):
        for which in Which:
            for token in forge.json_of(state, which)["tokens"].values():
                assert not token["type"].startswith("luksrotd") or SCHEMA.faults(token) == []


@few
@given(cases())
def test_the_preview_is_what_becomes_of_the_volume(case):
    before, done = forge.json_of(case.image), forge.json_of(case.done)
    found = {(each.what, each.name): each for each in preview(forge.view_of(case.image), case.change)}
    slots = {name for what, name in found if what == "keyslot"}
    assert slots == before["keyslots"].keys() ^ done["keyslots"].keys()
    for name in before["tokens"].keys() | done["tokens"].keys():
        first, last = before["tokens"].get(name, {}), done["tokens"].get(name, {})
        if ("token", name) in found:
            said = found["token", name]
            # The fingerprint comes from libcryptsetup's new keyslot.
            assert (said.before, {**said.after, "fingerprint": 0}) == (first, {**last, "fingerprint": 0})
        else:
            assert first == last
    wiped = {Extent(int(each.name), each.before["size"]) for each in found.values() if each.what == "area"}
    assert wiped == set(case.change.retired(forge.view_of(case.image).metadata))
