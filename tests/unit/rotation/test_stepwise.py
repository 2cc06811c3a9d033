# SPDX-License-Identifier: GPL-2.0-or-later
"""The steps as data, and what the header says after each of them."""

from dataclasses import replace

import pytest

from luksrotd.errors import (
    ConsistencyError,
    InvalidRequest,
    KeyExists,
    LastKeyslot,
    MetadataFull,
    NeedsPerson,
    NeedsReconcile,
    NoFreeArea,
    NoFreeKeyslot,
    Outcome,
    RequirementsPresent,
    UnknownKey,
)
from luksrotd.luks2 import layout
from luksrotd.luks2.layout import Which
from luksrotd.rotation import keys, policy, staging, stepwise
from luksrotd.rotation.edits import AddKeyslot, DestroyKeyslot, RemoveToken, SetToken
from luksrotd.rotation.lineage import lineage
from luksrotd.rotation.staging import StageRequest
from luksrotd.rotation.stepwise import Steps
from luksrotd.rotation.token import KeyState
from tests.support import forge
from tests.support.planning import ENROLL, FRESH, KEEP, NOW, OLD, ROTATE, after, planned, volume
from tests.support.simengine import make_volume, opened_by
from tests.support.stepping import stepped

PLAIN = make_volume([KEEP, OLD])
OURS = volume()
STAGE = StageRequest(ROTATE, NOW)


def staged_image():
    return stepped(OURS, stepwise.stage(forge.view_of(OURS), STAGE).edits)[-1]


STAGED = staged_image()

#: For each verb: the volume before, the steps, and the change of the atomic engine.
VERBS = {
    "enroll": (
        PLAIN,
        lambda seen: stepwise.enroll(seen, ENROLL),
        lambda seen: keys.enroll(seen, ENROLL),
    ),
    "rotate": (
        OURS,
        lambda seen: stepwise.rotate(seen, ROTATE),
        lambda seen: keys.rotate(seen, ROTATE),
    ),
    "stage": (OURS, lambda seen: stepwise.stage(seen, STAGE), lambda seen: staging.stage(seen, STAGE)),
    "finish": (
        STAGED,
        lambda seen: stepwise.finish(seen, "backup"),
        lambda seen: staging.finish(seen, "backup"),
    ),
    "abort": (STAGED, lambda seen: stepwise.abort(seen, "backup"), lambda seen: staging.abort(seen, "backup")),
    "remove": (OURS, lambda seen: stepwise.remove(seen, "backup"), lambda seen: keys.remove(seen, "backup")),
    "set data": (
        OURS,
        lambda seen: stepwise.set_data(seen, "backup", {"x": 1}),
        lambda seen: keys.set_data(seen, "backup", {"x": 1}),
    ),
}


@pytest.fixture(params=VERBS)
def verb(request):
    return request.param


def taken(verb):
    """The steps of a verb, and the image before them and after each."""
    image, decide, _ = VERBS[verb]
    steps = decide(forge.view_of(image))
    return steps, stepped(image, steps.edits)


def kinds(steps):
    return [type(edit) for edit in steps.edits]


def settled(image):
    """The image after what ``leftovers`` wants, until it wants nothing."""
    rounds = 0
    while (steps := stepwise.leftovers(forge.view_of(image))) is not None:
        image = stepped(image, steps.edits, seed=23)[-1]
        rounds += 1
    assert rounds <= 2
    return image


def said(image):
    """The metadata without what libcryptsetup draws by lot; keyslots by what opens them, tokens by generation."""
    raw = forge.json_of(image)
    for keyslot in raw["keyslots"].values():
        keyslot["kdf"]["salt"] = keyslot["area"]["offset"] = ""
    for token in raw["tokens"].values():
        token.pop("fingerprint", None)
    for digest in raw["digests"].values():
        digest["keyslots"].sort()
    return raw


# ---- the order


def test_I3_the_token_is_there_before_its_keyslot_which_is_born_with_it():
    steps = stepwise.rotate(forge.view_of(OURS), ROTATE)
    assert kinds(steps) == [SetToken, AddKeyslot, DestroyKeyslot, RemoveToken, SetToken]
    first, born, destroyed, removed, last = steps.edits
    assert (first.body["keyslots"], first.body["retires"], first.body["generation"]) == ([], ["0"], 2)
    assert first.body["state"] == "active"
    assert (born.keyslot, born.token) == (2, first.token)
    assert (destroyed.keyslot, removed.token) == (1, 0)
    assert (last.token, last.body["keyslots"], last.fingerprint_of) == (first.token, ["2"], 2)
    assert "retires" not in last.body
    assert (steps.generation, steps.keyslot, steps.decisive) == (2, 2, 1)


def test_an_enrolment_retires_nothing_and_says_so():
    steps = stepwise.enroll(forge.view_of(PLAIN), ENROLL)
    assert kinds(steps) == [SetToken, AddKeyslot, SetToken]
    assert steps.edits[0].body["retires"] == []


def test_a_staged_key_is_born_staged():
    steps = stepwise.stage(forge.view_of(OURS), STAGE)
    assert kinds(steps) == [SetToken, AddKeyslot, SetToken]
    assert {edit.body["state"] for edit in steps.edits if isinstance(edit, SetToken)} == {"staged"}
    assert steps.edits[0].body["retires"] == []


def test_finish_says_what_is_retired_before_it_goes():
    steps = stepwise.finish(forge.view_of(STAGED), "backup")
    assert kinds(steps) == [SetToken, DestroyKeyslot, RemoveToken, SetToken]
    assert (steps.edits[0].body["state"], steps.edits[0].body["retires"]) == ("active", ["0"])
    assert "expires_at" not in steps.edits[0].body


@pytest.mark.parametrize("verb", ["abort", "remove"])
def test_what_goes_is_marked_first(verb):
    steps, _ = taken(verb)
    assert kinds(steps) == [SetToken, DestroyKeyslot, RemoveToken]
    assert steps.edits[0].body["state"] == "retired"
    assert "retires" not in steps.edits[0].body


def test_I5_who_removes_a_key_must_show_another_one():
    assert stepwise.remove(forge.view_of(OURS), "backup").survivors == frozenset({0})
    assert stepwise.remove(forge.view_of(OURS), "backup").change.survivors == frozenset({0})


def test_a_token_without_a_keyslot_is_removed_at_once():
    steps = stepwise.remove(forge.view_of(forge.keyslot_removed(OURS, 1)), "backup")
    assert steps.edits == (RemoveToken(0),)


def test_finish_where_the_old_token_lost_its_keyslot():
    steps = stepwise.finish(forge.view_of(forge.keyslot_removed(STAGED, 1)), "backup")
    assert kinds(steps) == [SetToken, RemoveToken, SetToken]


def test_finish_where_the_old_token_is_gone():
    alone = forge.edited(forge.keyslot_removed(STAGED, 1), lambda raw: raw["tokens"].pop("0"))
    steps = stepwise.finish(forge.view_of(alone), "backup")
    assert kinds(steps) == [SetToken]
    assert "retires" not in steps.edits[0].body


# ---- as the other engine


def test_both_engines_leave_the_same_metadata(verb):
    image, _, atomic = VERBS[verb]
    _, images = taken(verb)
    other = after(image, planned(image, atomic(forge.view_of(image))))
    mine, theirs = said(images[-1]), said(other)
    if verb == "rotate":  # the pair is a new one; the atomic engine moves the token to the new keyslot
        assert mine["tokens"].pop("1") == theirs["tokens"].pop("0")
    assert mine == theirs


def test_I9_each_step_is_one_header_write(verb):
    steps, images = taken(verb)
    seqids = [forge.view_of(image).seqid for image in images]
    assert seqids == list(range(seqids[0], seqids[0] + len(steps.edits) + 1))


# ---- cut between two steps


def test_I1_one_of_the_two_states_is_in_force_after_every_step(verb):
    steps, images = taken(verb)
    before, done = lineage(forge.view_of(images[0]), "backup"), lineage(forge.view_of(images[-1]), "backup")
    for number, image in enumerate(images):
        line = lineage(forge.view_of(image), "backup")
        assert not line.unclear
        expected = done if number > steps.decisive else before
        assert _generation(line.current) == _generation(expected.current)
        assert _generation(line.staged) == _generation(expected.staged)
        secrets = {1: OLD, 2: FRESH} if verb not in ("enroll", "set data") else {1: FRESH if verb == "enroll" else OLD}
        for key in (line.current, line.staged):
            if key is not None:
                assert opened_by(image, secrets[key.token.generation]) == [key.keyslot.id]
        assert opened_by(image, KEEP) == [0]


def test_I3_no_keyslot_of_ours_is_without_a_token_after_any_step(verb):
    _, images = taken(verb)
    foreign = [0, 1] if verb == "enroll" else [0]
    for image in images:
        assert list(forge.view_of(image).ordinary) == foreign


def test_I7_what_is_left_to_do_is_read_off_the_header(verb):
    steps, images = taken(verb)
    ends = said(images[0]), said(images[-1])
    for number, image in enumerate(images):
        expected = ends[1] if number > steps.decisive else ends[0]
        assert said(settled(image)) == expected


def test_nothing_is_left_at_either_end(verb):
    _, images = taken(verb)
    assert stepwise.leftovers(forge.view_of(images[0])) is None
    assert stepwise.leftovers(forge.view_of(images[-1])) is None


def test_the_outcome_says_where_it_stopped():
    steps = Steps((RemoveToken(0), RemoveToken(1), RemoveToken(2), RemoveToken(3)), decisive=1)
    assert [steps.outcome(made) for made in range(5)] == [
        Outcome.UNCHANGED,
        Outcome.UNKNOWN,
        Outcome.WIPE_PENDING,
        Outcome.WIPE_PENDING,
        Outcome.COMMITTED,
    ]


def test_whether_the_end_was_reached(verb):
    steps, images = taken(verb)
    assert stepwise.reached(forge.view_of(images[-1]), steps)
    assert not stepwise.reached(forge.view_of(images[0]), steps)


def test_the_end_was_not_reached_where_the_token_is_gone():
    steps, images = taken("rotate")
    gone = forge.edited(images[-1], lambda raw: raw["tokens"].clear())
    assert not stepwise.reached(forge.view_of(gone), steps)


# ---- leftovers


def test_the_older_of_two_pairs_goes():
    """What the three steps of old (add, token, destroy) leave: no token says what it retires."""
    two = forge.with_token(OURS, 0, 1, generation=2)
    assert stepwise.leftovers(forge.view_of(two)).edits == (DestroyKeyslot(1), RemoveToken(0))


def test_I5_a_superseded_keyslot_that_another_tool_has_changed_is_left_alone():
    images = taken("rotate")[1]
    changed = forge.edited(images[2], lambda raw: raw["keyslots"]["1"]["kdf"].update(salt="c2FsdA=="))
    assert kinds(stepwise.leftovers(forge.view_of(changed))) == [SetToken]


def test_two_keys_that_nobody_can_tell_apart_are_left_alone():
    assert stepwise.leftovers(forge.view_of(forge.with_token(OURS, 0, 1))) is None


def test_a_new_key_that_does_not_open_is_withdrawn():
    images = taken("rotate")[1]
    back = stepwise.withdraw(forge.view_of(images[2]), 1)
    assert kinds(back) == [SetToken, DestroyKeyslot, RemoveToken]
    for image in stepped(images[2], back.edits)[1:]:
        assert lineage(forge.view_of(image), "backup").current.token.generation == 1
        assert said(settled(image)) == said(OURS)


# ---- whether a step was taken


def test_a_step_that_was_taken_and_one_that_was_not(verb):
    steps, images = taken(verb)
    for edit, before, done in zip(steps.edits, images, images[1:], strict=False):
        assert stepwise.made(forge.pair_of(before), forge.pair_of(done), edit)
        assert not stepwise.made(forge.pair_of(before), forge.pair_of(before), edit)


def test_a_step_that_did_something_else():
    steps, images = taken("rotate")
    with pytest.raises(ConsistencyError):
        stepwise.made(forge.pair_of(images[0]), forge.pair_of(images[2]), steps.edits[0])


def test_a_keyslot_that_was_born_with_no_token():
    born = stepped(OURS, [AddKeyslot(2, pbkdf=ROTATE.pbkdf)])[-1]
    with pytest.raises(ConsistencyError, match="token that is not there"):
        stepwise.made(forge.pair_of(OURS), forge.pair_of(born), AddKeyslot(2, pbkdf=ROTATE.pbkdf, token=9))


def test_a_keyslot_that_was_born_with_another_token():
    images = taken("rotate")[1]
    born = stepped(images[1], [AddKeyslot(2, pbkdf=ROTATE.pbkdf)])[-1]
    with pytest.raises(ConsistencyError, match="tokens 1"):
        stepwise.made(forge.pair_of(images[1]), forge.pair_of(born), AddKeyslot(2, pbkdf=ROTATE.pbkdf, token=1))


def test_a_step_that_reached_one_copy_only():
    steps, images = taken("rotate")
    half = forge.erased(images[1], Which.SECONDARY)
    with pytest.raises(ConsistencyError, match="differ"):
        stepwise.made(forge.pair_of(images[0]), forge.pair_of(half), steps.edits[0])


# ---- refusals


def full(kind, members, count):
    return forge.edited(OURS, lambda raw: raw.update({kind: {**raw[kind], **dict.fromkeys(map(str, count), members)}}))


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (PLAIN, UnknownKey),
        (STAGED, NeedsPerson),
        (forge.torn(OURS, bytes(len(OURS)), Which.SECONDARY), NeedsReconcile),
        (forge.edited(OURS, lambda raw: raw["config"].update(requirements={"mandatory": ["x"]})), RequirementsPresent),
        (forge.with_token(OURS, 1, wipe=forge.intent(forge.view_of(PLAIN).free[0])), NeedsReconcile),
        (full("tokens", {"type": "x", "keyslots": []}, range(1, layout.TOKENS_MAX)), NoFreeKeyslot),
        (forge.with_token(make_volume([KEEP, OLD], areas=2), 1), NoFreeArea),
        (forge.with_token(OURS, 1, data={"x": "x" * 6000}), MetadataFull),
        (forge.edited(OURS, lambda raw: raw["keyslots"]["1"]["kdf"].update(salt="c2FsdA==")), NeedsPerson),
    ],
)
def test_a_rotation_is_refused_before_anything_is_written(image, error):
    request = ROTATE if error is not MetadataFull else replace(ROTATE, data=None)
    with pytest.raises(error):
        stepwise.rotate(forge.view_of(image), request)


def test_other_verbs_refuse_as_the_other_engine_does():
    for call, error in [
        (lambda: stepwise.enroll(forge.view_of(OURS), ENROLL), KeyExists),
        (lambda: stepwise.stage(forge.view_of(STAGED), STAGE), NeedsPerson),
        (lambda: stepwise.finish(forge.view_of(OURS), "backup"), InvalidRequest),
        (lambda: stepwise.finish(forge.view_of(STAGED), "backup", 7), InvalidRequest),
        (lambda: stepwise.finish(forge.view_of(STAGED), "backup", None, "set"), InvalidRequest),
        (lambda: stepwise.abort(forge.view_of(OURS), "backup"), InvalidRequest),
        (lambda: stepwise.remove(forge.view_of(STAGED), "backup"), NeedsPerson),
        (lambda: stepwise.set_data(forge.view_of(PLAIN), "backup", {}), UnknownKey),
    ]:
        with pytest.raises(error):
            call()


def test_I5_the_last_way_in_is_not_removed():
    alone = forge.keyslot_removed(OURS, 0)
    with pytest.raises(LastKeyslot):
        policy.check_retirement(forge.view_of(alone), stepwise.remove(forge.view_of(alone), "backup").change)


def test_data_of_a_key_that_lost_its_keyslot():
    steps = stepwise.set_data(forge.view_of(forge.keyslot_removed(OURS, 1)), "backup", {"x": 1})
    assert (steps.generation, steps.keyslot) == (1, None)


def _generation(key):
    return key and (key.token.generation, KeyState(key.token.state))
