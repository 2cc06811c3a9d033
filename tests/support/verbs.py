# SPDX-License-Identifier: GPL-2.0-or-later
"""Every verb that writes, each with a simulated volume on which it has something to do."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from luksrotd.luks2.layout import Which
from luksrotd.rotation.edits import NEW as NEW_SECRET
from luksrotd.rotation.edits import UNLOCK
from luksrotd.service.draft import begin
from tests.support import forge
from tests.support.simengine import make_volume
from tests.support.simulation import CHEAP, MAIN, NEW, OLD, Simulation, run, secrets

OTHER = b"another passphrase"
RECOVERY = {"type": "systemd-recovery", "keyslots": ["1"]}
Operate = Callable[[Simulation], object]


@dataclass(frozen=True, slots=True)
class Verb:
    """``operate`` succeeds on a simulation of the volume that ``before`` gives, and writes to it."""

    before: Callable[[], bytes]
    operate: Operate


def enroll(simulation: Simulation) -> object:
    """Keyslot and token are born."""
    return simulation.enroll(MAIN, OLD, ref="vault/1")


def rotate(simulation: Simulation, unlock: bytes = MAIN) -> object:
    """Generation 2 in place of 1."""
    return simulation.rotate(unlock, NEW, ref="vault/2")


def stage(simulation: Simulation) -> object:
    """Generation 2 beside 1."""
    with secrets(**{UNLOCK: MAIN, NEW_SECRET: NEW}) as sources:
        return run(simulation.volumes.stage(simulation.ref, sources, data={"ref": "vault/2"}, pbkdf=CHEAP))


def finish(simulation: Simulation) -> object:
    """Generation 1 goes."""
    return run(simulation.volumes.finish(simulation.ref))


def abort(simulation: Simulation) -> object:
    """Generation 2 goes."""
    return run(simulation.volumes.abort(simulation.ref))


def remove(simulation: Simulation) -> object:
    """The key goes."""
    with secrets(**{UNLOCK: MAIN}) as sources:
        return run(simulation.volumes.remove(simulation.ref, sources))


def set_data(simulation: Simulation) -> object:
    """Other associated data."""
    return run(simulation.volumes.set_data(simulation.ref, {"ref": "vault/3"}))


def adopt(simulation: Simulation) -> object:
    """Keyslot 1 becomes ours."""
    return run(simulation.volumes.adopt(simulation.ref, 1, data={"ref": "vault/4"}))


def release(simulation: Simulation) -> object:
    """The key becomes an ordinary keyslot."""
    return run(simulation.volumes.release(simulation.ref))


def recreate_token(simulation: Simulation) -> object:
    """The old key's token, which is lost."""
    return _recreate(simulation, {UNLOCK: OLD})


def recreate_pair(simulation: Simulation) -> object:
    """Token and keyslot, where the keyslot is lost."""
    return _recreate(simulation, {UNLOCK: MAIN, NEW_SECRET: NEW})


def draft(simulation: Simulation) -> object:
    """A keyslot and a token more, another keyslot gone: one commit."""

    async def compose() -> None:
        transaction = await begin(simulation.host, simulation.ref)
        keyslot = transaction.draft.add_keyslot("first", CHEAP)
        transaction.draft.set_token({"type": "site-note", "keyslots": [str(keyslot)], "note": "x"})
        transaction.draft.destroy_keyslot(1)
        with secrets(**{UNLOCK: MAIN, "first": NEW}) as sources:
            await transaction.commit(sources)

    return run(compose())


def draft_removal(simulation: Simulation) -> object:
    """A keyslot gone, and nothing that could carry the intent."""

    async def compose() -> None:
        transaction = await begin(simulation.host, simulation.ref)
        transaction.draft.destroy_keyslot(1)
        with secrets(**{UNLOCK: MAIN}) as sources:
            await transaction.commit(sources)

    return run(compose())


def reconcile(simulation: Simulation) -> object:
    """Whatever is owed."""
    return simulation.reconcile()


@functools.cache
def plain() -> bytes:
    """Two passphrases, keyslots 0 and 1; no key of ours."""
    return make_volume([MAIN, OTHER])


@functools.cache
def recovery() -> bytes:
    """Keyslot 1 is named by another tool's token."""
    return forge.edited(plain(), lambda raw: raw["tokens"].update({"0": RECOVERY}))


@functools.cache
def enrolled() -> bytes:
    """With generation 1 of a key in keyslot 2."""
    return after(plain(), enroll)


@functools.cache
def staged() -> bytes:
    """With generation 2 beside it."""
    return after(enrolled(), stage)


@functools.cache
def token_lost() -> bytes:
    """Another tool has removed our token."""
    return forge.edited(enrolled(), lambda raw: raw["tokens"].clear())


@functools.cache
def keyslot_lost() -> bytes:
    """Another tool has removed our keyslot."""
    return forge.keyslot_removed(enrolled(), 2)


@functools.cache
def pending() -> bytes:
    """A power cut came before the wipe of a rotation."""
    simulation = Simulation(enrolled())
    rotate(simulation)
    image = bytearray(enrolled())
    for write in [write for epoch in simulation.disk.epochs()[:3] for write in epoch]:
        image[write.offset : write.offset + len(write.data)] = write.data
    return bytes(image)


def torn(image: bytes) -> bytes:
    """The same volume with its primary header torn."""
    return forge.unsealed(image, Which.PRIMARY)


def after(image: bytes, operate: Operate) -> bytes:
    """The volume after an undisturbed operation."""
    simulation = Simulation(image)
    operate(simulation)
    return simulation.disk.content


VERBS: dict[str, Verb] = {
    "enroll": Verb(plain, enroll),
    "rotate": Verb(enrolled, rotate),
    "rotate by the old key": Verb(enrolled, lambda simulation: rotate(simulation, OLD)),
    "stage": Verb(enrolled, stage),
    "finish": Verb(staged, finish),
    "abort": Verb(staged, abort),
    "remove": Verb(enrolled, remove),
    "set-data": Verb(enrolled, set_data),
    "adopt": Verb(plain, adopt),
    "adopt with a token": Verb(recovery, adopt),
    "release": Verb(lambda: after(plain(), adopt), release),
    "release with a token": Verb(lambda: after(recovery(), adopt), release),
    "recreate the token": Verb(token_lost, recreate_token),
    "recreate the pair": Verb(keyslot_lost, recreate_pair),
    "draft": Verb(plain, draft),
    "draft of a removal": Verb(plain, draft_removal),
    "reconcile of a pending wipe": Verb(pending, reconcile),
    "reconcile of a torn copy": Verb(lambda: torn(pending()), reconcile),
    "reconcile of an orphan": Verb(keyslot_lost, reconcile),
    "rotate that heals first": Verb(lambda: torn(enrolled()), rotate),
    "rotate that wipes first": Verb(pending, lambda simulation: simulation.rotate(MAIN, b"third", ref="vault/3")),
}


def _recreate(simulation: Simulation, named: dict[str, bytes]) -> object:
    data: dict[str, Any] = {"ref": "vault/5"}
    with secrets(**named) as sources:
        return run(simulation.volumes.recreate(simulation.ref, sources, data=data, pbkdf=CHEAP))
