# SPDX-License-Identifier: GPL-2.0-or-later
"""Verbs that are unlocked by a LUKS2 token: the keyslot that it opens counts as with a passphrase."""

import os

import pytest

from luksrotd.errors import EngineError, LastKeyslot, SecretRejected, WrongCredential
from luksrotd.ports import SecretFd, TokenSource
from luksrotd.rotation.edits import UNLOCK
from luksrotd.service.draft import begin
from tests.service.test_sets import REQUEST
from tests.support.simengine import make_volume, opened_by
from tests.support.simset import SimulatedSet, enrolled
from tests.support.simulation import CHEAP, MAIN, Simulation, run, secrets
from tests.support.tokenplugin import token

OTHER, FRESH = b"the key of keyslot 1", b"a fresh key"


@pytest.fixture
def simulation():
    """MAIN opens keyslot 0, which token 0 knows; OTHER keyslot 1 with token 1; token 2 cannot be asked."""
    simulation = Simulation(make_volume([MAIN, OTHER]))

    def compose(draft):
        for body in (token(MAIN, [0]), token(OTHER, [1]), token(MAIN, [0], errno=5)):
            draft.set_token(body)

    simulation.transaction(compose)
    simulation.disk.log.clear()
    return simulation


def enroll(simulation, source):
    with secrets(new=FRESH) as new:
        return run(simulation.volumes.enroll(simulation.ref, {UNLOCK: source, **new}, data={}, pbkdf=CHEAP))


def destroy(simulation, keyslot, source):
    """The keyslot and all that names it."""

    def compose(draft):
        draft.destroy_keyslot(keyslot)
        for number in {0: (0, 2), 1: (1,)}[keyslot]:
            draft.remove_token(number)

    async def work():
        transaction = await begin(simulation.host, simulation.ref)
        compose(transaction.draft)
        return await transaction.commit({UNLOCK: source})

    return run(work())


@pytest.mark.parametrize("number", [0, 1, None])
def test_a_token_unlocks(simulation, number):
    assert enroll(simulation, TokenSource(number)).keyslot == 2
    assert opened_by(simulation.disk.content, FRESH) == [2]


@pytest.mark.parametrize(("number", "refusal"), [(2, EngineError), (7, WrongCredential)])
def test_one_that_does_not_changes_nothing(simulation, number, refusal):
    with pytest.raises(refusal):
        enroll(simulation, TokenSource(number))
    assert not simulation.disk.log


def test_a_keyslot_goes_only_by_a_token_of_one_that_stays(simulation):
    with pytest.raises(LastKeyslot):
        destroy(simulation, 0, TokenSource(0))
    assert not simulation.disk.log
    destroy(simulation, 0, TokenSource(1))
    assert (opened_by(simulation.disk.content, MAIN), opened_by(simulation.disk.content, OTHER)) == ([], [1])


def test_any_token_may_be_one_of_several_that_open(simulation):
    """The first that opens names the keyslot that goes; another one opens the one that stays."""
    destroy(simulation, 0, TokenSource())
    assert opened_by(simulation.disk.content, OTHER) == [1]


def test_a_keyslot_is_adopted_by_the_token_that_opens_it(simulation):
    adopted = simulation.volumes.adopt(simulation.ref, 1, {UNLOCK: TokenSource(0)}, data={})
    with pytest.raises(WrongCredential, match="it opens keyslot 0, not 1"):
        run(adopted)
    assert not simulation.disk.log


def test_a_pin_that_can_be_read_only_once_is_not_enough_for_a_set():
    simulated = SimulatedSet([enrolled(0), enrolled(1)])
    reader, writer = os.pipe()
    os.write(writer, b"1234")
    os.close(writer)
    with secrets(new=FRESH) as new, pytest.raises(SecretRejected, match="only once"):
        run(simulated.sets.stage(simulated.refs, {UNLOCK: TokenSource(0, SecretFd(reader)), **new}, REQUEST))
    os.close(reader)
    assert simulated.order == []
