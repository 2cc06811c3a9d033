# SPDX-License-Identifier: GPL-2.0-or-later
"""That the judge can see: every wrong order, every dropped flush, every operation in parts must be caught."""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest

from luksrotd.luks2.pair import parse_pair
from luksrotd.rotation.protocol import Write
from tests.support import forge
from tests.support.crash import Epoch, Image, merged, moved, swapped
from tests.support.crashjudge import Judge, Scenario, judge_all
from tests.support.crashverbs import VERBS
from tests.support.crashverbs import simulated as recorded
from tests.support.forge import Json


def simulated(name: str) -> Scenario:
    """With large sectors: fewer states, and nothing that is wrong hides in the others."""
    return recorded(name, sector=4096)


AREA, FIRST, SECOND, WIPE, CLEAR_FIRST, CLEAR_SECOND = "area", "primary", "secondary", "wipe", "clear 1", "clear 2"
#: The shapes that a transaction can have.
SHAPES = {
    "rotation": (AREA, FIRST, SECOND, WIPE, CLEAR_FIRST, CLEAR_SECOND),
    "transaction: keyslots and tokens exchanged": (AREA, FIRST, SECOND, WIPE, CLEAR_FIRST, CLEAR_SECOND),
    "enrolment": (AREA, FIRST, SECOND),
    "staging": (AREA, FIRST, SECOND),
    "finish": (FIRST, SECOND, WIPE, CLEAR_FIRST, CLEAR_SECOND),
    "abort": (FIRST, SECOND, WIPE, CLEAR_FIRST, CLEAR_SECOND),
    "removal": (FIRST, SECOND, WIPE, CLEAR_FIRST, CLEAR_SECOND),
    "transaction: two keyslots and their tokens gone": (FIRST, SECOND, WIPE, CLEAR_FIRST, CLEAR_SECOND),
    "other associated data": (FIRST, SECOND),
    "reconcile of a pending wipe": (WIPE, CLEAR_FIRST, CLEAR_SECOND),
    "reconcile of a wipe record": (WIPE, CLEAR_FIRST, CLEAR_SECOND),
}
#: libcryptsetup takes the newer copy whichever it is, so these orders are as safe.
AS_SAFE = {(FIRST, SECOND), (CLEAR_FIRST, CLEAR_SECOND)}


def reorders() -> Iterator[tuple[str, str, Callable[[Sequence[Epoch]], list[Epoch]]]]:
    """Of each shape: every flush dropped, every neighbours exchanged, every phase forgotten, the wipe elsewhere."""
    for name, shape in SHAPES.items():
        for place, (one, next_one) in enumerate(pairwise(shape)):
            yield name, f"flush after {one} dropped", lambda epochs, place=place: merged(epochs, place)
            if (one, next_one) not in AS_SAFE:
                yield name, f"{next_one} before {one}", lambda epochs, place=place: swapped(epochs, place)
        for place, one in enumerate(shape):
            yield name, f"{one} forgotten", lambda epochs, place=place: [*epochs[:place], *epochs[place + 1 :]]
        wipe = shape.index(WIPE) if WIPE in shape else None
        if wipe:
            yield name, "wipe first", lambda epochs, place=wipe: moved(epochs, place, 0)
        if wipe is not None:
            yield name, "wipe last", lambda epochs, place=wipe: moved(epochs, place, len(epochs) - 1)
            yield name, "the intent never cleared", lambda epochs: epochs[:-2]
        if AREA in shape:
            yield name, "area after both headers", lambda epochs: moved(epochs, 0, 2)


REORDERS = {f"{name}: {what}": (name, mutate) for name, what, mutate in reorders()}


@pytest.mark.parametrize("mutant", REORDERS)
def test_every_wrong_order_is_caught(mutant):
    name, mutate = REORDERS[mutant]
    scenario = simulated(name)
    assert len(scenario.epochs) == len(SHAPES[name])
    assert is_caught(scenario, mutate(scenario.epochs))


def is_caught(scenario: Scenario, epochs: Sequence[Epoch]) -> bool:
    """Stops at the first violation."""
    judge, enumeration = Judge(scenario), scenario.enumeration(epochs)
    if judge.finished(enumeration.starts[-1]):
        return True
    return any(judge.violations(image) for image in enumeration.images()) or bool(judge_all(judge, enumeration))


def headers_of(scenario: Scenario, image: Image | bytes, edit: Callable[[Json], object], seqid: int) -> list[Epoch]:
    """A commit, each copy flushed, of the header of ``image`` after ``edit``."""
    whole = bytes(image)
    forged = forge.with_fields(forge.edited(whole, edit), seqid=seqid)
    size = parse_pair(whole).hdr_size
    return [[Write(0, forged[:size])], [Write(size, forged[size : 2 * size])]]


def in_parts(name: str, edit: Callable[[Json], object], *, of: str, at: int) -> tuple[Scenario, list[Epoch]]:
    """The operation with a commit more, at place ``at``: the header ``of`` before or after it, after ``edit``."""
    scenario = copy.copy(simulated(name))
    image = scenario.before if of == "before" else scenario.after
    seqid = parse_pair(scenario.before).winner.header.seqid + 1
    extra = headers_of(scenario, image, edit, seqid)
    return scenario, [*scenario.epochs[:at], *extra, *scenario.epochs[at:]]


def gone(kind: str, number: int) -> Callable[[Json], object]:
    """Without that token, or that keyslot."""

    def edit(raw: Json) -> None:
        del raw[kind][str(number)]
        if kind == "keyslots":
            for owner in (*raw["digests"].values(), *raw["tokens"].values()):
                owner["keyslots"] = [slot for slot in owner["keyslots"] if slot != str(number)]

    return edit


def both(*edits: Callable[[Json], object]) -> Callable[[Json], object]:
    return lambda raw: [edit(raw) for edit in edits]


#: An operation in two commits, each of them ordered and flushed as it should be: what the stock tools do.
PARTS = {
    "the new keyslot before its token": ("enrolment", gone("tokens", 0), "after", 1),
    "the staged keyslot before its token": ("staging", gone("tokens", 1), "after", 1),
    "the recreated keyslot before its token": ("recreation of the pair", gone("tokens", 0), "after", 1),
    "the token removed before its keyslot": ("removal", gone("tokens", 0), "before", 0),
    "the keyslot removed before its token": ("removal", gone("keyslots", 2), "before", 0),
    "the old pair gone before the staged one is active": (
        "finish", both(gone("keyslots", 2), gone("tokens", 0)), "before", 0,
    ),
    "the staged token gone before its keyslot": ("abort", gone("tokens", 1), "before", 0),
    "the old keyslot gone before the new one is there": ("rotation", gone("keyslots", 2), "before", 0),
    "one of two keyslots first": (
        "transaction: keyslots and tokens exchanged", both(gone("keyslots", 4), gone("tokens", 4)), "after", 1,
    ),
    "the tokens of a transaction after its keyslots": (
        "transaction: keyslots and tokens exchanged", both(gone("tokens", 3), gone("tokens", 4)), "after", 1,
    ),
    "one of two removals first": (
        "transaction: two keyslots and their tokens gone", both(gone("keyslots", 1), gone("tokens", 1)), "before", 0,
    ),
    "one of many token edits first": ("transaction: tokens only", gone("tokens", 3), "after", 0),
    "the adopted token gone before ours is there": (
        "adoption of a systemd-recovery keyslot", gone("tokens", 0), "before", 0,
    ),
    "our token gone before the adopted one is back": ("release to systemd-recovery", gone("tokens", 0), "before", 0),
}  # fmt: skip


@pytest.mark.parametrize("mutant", PARTS)
def test_every_operation_in_parts_is_caught(mutant):
    name, edit, of, at = PARTS[mutant]
    scenario, epochs = in_parts(name, edit, of=of, at=at)
    assert is_caught(scenario, epochs)


def test_an_operation_in_parts_is_caught_for_being_in_parts():
    """The extra commit alone is no violation: with the header as it was before, only its number is higher."""
    for name in ("removal", "enrolment"):
        scenario, epochs = in_parts(name, lambda raw: None, of="before", at=0)
        found = judge_all(Judge(scenario), scenario.enumeration(epochs))
        assert not [what for what in found if what.startswith("I3")]


@pytest.mark.parametrize("name", ["rotation", "removal", "staging"])
def test_a_last_flush_that_is_missing_is_caught(name):
    """Without it, success may be reported of a device that a power cut still takes back."""
    scenario = simulated(name)
    judge = Judge(scenario)
    enumeration = scenario.enumeration()
    last = len(scenario.epochs) - 1
    after_success = [crash.image(enumeration.starts[last]) for crash in enumeration.crashes([last])]
    assert any(judge.finished(image) for image in after_success if image != enumeration.starts[-1])


def test_every_shape_has_mutants():
    """A verb whose shape is none of these is a new order of writes: it needs mutants of its own."""
    known = {len(shape) for shape in SHAPES.values()}
    assert {
        len(simulated(name).epochs) for name in VERBS if not name.startswith(("reconcile", "rotation that", "scrub"))
    } <= known
