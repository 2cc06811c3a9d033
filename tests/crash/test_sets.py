# SPDX-License-Identifier: GPL-2.0-or-later
"""Power cuts at every write while a key is changed on a set of volumes: from each, the caller reaches either end."""

import functools
from collections.abc import Callable, Iterator

import pytest

from luksrotd.errors import InvalidRequest, NeedsPerson
from luksrotd.luks2.pair import parse_pair
from luksrotd.rotation.sets import SetState
from luksrotd.rotation.view import view
from tests.support.crash import Enumeration
from tests.support.simset import SIZE, SimulatedSet, copies, enrolled, opens
from tests.support.simulation import MAIN, NEW, OLD

State = tuple[bytes, ...]


@functools.cache
def old() -> State:
    return tuple(enrolled(number) for number in range(SIZE))


@functools.cache
def staged() -> State:
    return after(old(), SimulatedSet.stage)


def after(images: State, operate: Callable[[SimulatedSet], object]) -> State:
    simulated = SimulatedSet(images)
    operate(simulated)
    return tuple(simulated.images)


def partly() -> State:
    """As a power cut leaves it between the first and the second volume."""
    return (staged()[0], *old()[1:])


def halfway() -> State:
    """The same for finish."""
    return (after(staged(), SimulatedSet.finish)[0], *staged()[1:])


#: What is interrupted: where it begins, and what is done.
SEQUENCES = {
    "stage": (old, SimulatedSet.stage),
    "stage, taken up again": (partly, SimulatedSet.stage),
    "finish": (staged, SimulatedSet.finish),
    "finish, taken up again": (halfway, SimulatedSet.finish),
    "abort": (staged, SimulatedSet.abort),
    "abort of a part": (partly, SimulatedSet.abort),
}


def cuts(before: State, operate: Callable[[SimulatedSet], object]) -> Iterator[State]:
    """Every state in which a power cut leaves the set."""
    simulated = SimulatedSet(before)
    operate(simulated)
    assert simulated.order == sorted(simulated.order), "the volumes are not changed one after the other"
    done = tuple(simulated.images)
    for number, disk in enumerate(simulated.disks):
        *epochs, last = disk.epochs()
        assert not last, "the last write was not flushed"
        headers = 2 * parse_pair(before[number]).hdr_size
        for image in Enumeration(before[number], epochs, headers).images():
            yield (*done[:number], bytes(image), *before[number + 1 :])
    yield done


@functools.cache
def check_instant(image: bytes) -> None:
    """All other credentials, and a key that the associated data names, open the volume, by each copy alone."""
    for alone in copies(image):
        assert opens(alone, MAIN)
        assert any(opens(alone, secret) for secret in (OLD, NEW))
        assert all(key.keyslot is not None for key in view(parse_pair(alone)).keys)


@functools.cache
def rebooted(image: bytes) -> bytes:
    """One volume after the reconcile at boot; what is random in it counts for nothing afterwards."""
    simulated = SimulatedSet([image])
    simulated.reconcile()
    check_instant(simulated.images[0])
    return simulated.images[0]


def check_end(images: State, there: bytes, gone: bytes, state: SetState) -> None:
    for image in images:
        assert (opens(image, MAIN), opens(image, there), opens(image, gone)) == (True, True, False)
        seen = view(parse_pair(image))
        assert (len(seen.keys), seen.pending, seen.records, seen.pair.agree) == (1, (), (), True)
    assert SimulatedSet(images, seed=8).stage().state is SetState.STAGED  # nothing stands in the way of the next one
    if state is SetState.FINISHED:
        again = SimulatedSet(images)
        assert again.finish().state is SetState.FINISHED
        assert again.order == []


def check_ends(images: State) -> None:
    """Bring the set forward, and back while the old key opens all of it."""
    forward, back = SimulatedSet(images), SimulatedSet(images)
    if all(opens(image, OLD) for image in images):
        forward.stage()
        if any(opens(image, NEW) for image in images):
            back.abort()
        else:
            with pytest.raises(InvalidRequest, match="no new generation of it is staged"):
                back.abort()
        check_end(tuple(back.images), OLD, NEW, SetState.UNSTAGED)
    else:
        with pytest.raises((InvalidRequest, NeedsPerson), match="it is finished on"):
            back.abort()
    forward.finish()
    check_end(tuple(forward.images), NEW, OLD, SetState.FINISHED)


@pytest.mark.parametrize("name", SEQUENCES)
def test_either_end_can_be_reached_from_every_crash_state(name, report):
    start, operate = SEQUENCES[name]
    states, settled = 0, {}
    for images in cuts(start(), operate):
        states += 1
        for image in images:
            check_instant(image)
        found = tuple(rebooted(image) for image in images)
        settled[tuple((str(parse_pair(image).winner.metadata.raw), opens(image, OLD)) for image in found)] = found
    for found in settled.values():
        check_ends(found)
    report(f"simulated set of {SIZE} volumes, {name}: {states} crash states, {len(settled)} different after reconcile")


@pytest.mark.parametrize("name", SEQUENCES)
def test_nobody_has_to_reconcile_first(name):
    """A sample of the states: the calls finish themselves what the crash has left."""
    start, operate = SEQUENCES[name]
    states = list(cuts(start(), operate))
    for images in states[:: max(1, len(states) // 10)]:
        check_ends(images)
