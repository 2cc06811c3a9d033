# SPDX-License-Identifier: GPL-2.0-or-later
"""Every operation whose crash states are examined: how its volume is prepared, and the operation itself.

One catalogue for simulated volumes, real ones and the published table.  Whatever writes to a header goes in here.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from luksrotd.luks2.pair import parse_pair
from luksrotd.rotation.draft import Draft
from luksrotd.service.headers import Headers
from tests.support import forge
from tests.support.crash import Enumeration
from tests.support.crashjudge import Scenario, record
from tests.support.simengine import HDR_SIZE, KEY_SIZE, make_volume
from tests.support.simfiles import SimFiles
from tests.support.simulation import CHEAP, MAIN, NEW, OLD, Simulation, run

OTHER: Final = b"another passphrase"
THIRD: Final = b"third key"
#: Every secret that is in play, by what it is called in the findings.
SECRETS: Final = {"main": MAIN, "other": OTHER, "old": OLD, "new": NEW, "third": THIRD}
#: Keyslots 0 and 1 of every volume, which no token names.
ORDINARY: Final = (MAIN, OTHER)
#: Which secret the associated data describe: what a reader of the token would fetch from the vault.
DESCRIBED: Final = {"vault/1": "old", "vault/1, moved": "old", "vault/2": "new", "vault/3": "third", "desk": "other"}

OLD_DATA: Final = {"ref": "vault/1"}
NEW_DATA: Final = {"ref": "vault/2"}
RECOVERY: Final = {"type": "systemd-recovery", "keyslots": ["1"]}


@dataclass(frozen=True, slots=True)
class Verb:
    """``prepare`` makes the volume, which has the keyslots of ``ORDINARY``, ready; ``operate`` is the operation."""

    operate: Callable[[Simulation], object]
    prepare: Callable[[Simulation], object] = lambda _: None
    releases: bool = False
    """Whether a keyslot may be left without the token of ours that it had."""
    use_case: str = ""
    """Of ``service.volume.Volumes``; '' for a transaction."""


def enroll(simulation: Simulation) -> None:
    """The key of most operations: keyslot 2, token 0."""
    simulation.enroll(MAIN, OLD, **OLD_DATA)


def stage(simulation: Simulation) -> None:
    """Two generations of it."""
    enroll(simulation)
    simulation.stage(MAIN, NEW, **NEW_DATA)


def rotate(simulation: Simulation) -> None:
    """One in place of the other."""
    simulation.rotate(MAIN, NEW, **NEW_DATA)


def _adopt(simulation: Simulation) -> None:
    simulation.adopt(1, ref="desk")


def _recovery_token(simulation: Simulation) -> None:
    simulation.transaction(lambda draft: draft.set_token(RECOVERY))


def _adopted(simulation: Simulation) -> None:
    _recovery_token(simulation)
    _adopt(simulation)


def _token_lost(simulation: Simulation) -> None:
    enroll(simulation)
    simulation.release()


def _keyslot_lost(simulation: Simulation) -> None:
    """Another tool has removed the keyslot; the token is left."""
    enroll(simulation)
    content = simulation.disk.content
    simulation.disk.replace(0, forge.keyslot_removed(content, 2)[: 2 * parse_pair(content).hdr_size])


def _foreign_tokens(simulation: Simulation) -> None:
    enroll(simulation)

    def compose(draft: Draft) -> None:
        draft.set_token({"type": "acme", "keyslots": ["1"], "serial": 1})
        draft.set_token({"type": "acme-note", "keyslots": [], "text": "before"})

    simulation.transaction(compose)


def _exchange(draft: Draft) -> None:
    """Two keyslots come with a token each, one goes with its token, a note is rewritten: one commit."""
    for secret in ("new", "third"):
        keyslot = draft.add_keyslot(secret, CHEAP)
        draft.set_token(
            {"type": "acme", "keyslots": [str(keyslot)], "ref": {"new": "vault/2", "third": "vault/3"}[secret]}
        )
    draft.destroy_keyslot(1)
    draft.remove_token(1)
    draft.set_token({"type": "acme-note", "keyslots": ["0"], "text": "after"}, 2)


def _dismantle(draft: Draft) -> None:
    """Two keyslots and their tokens go, one of them a managed key; nothing comes."""
    for number in (1, 2):
        draft.destroy_keyslot(number)
    for token in (0, 1):
        draft.remove_token(token)


def _annotate(draft: Draft) -> None:
    """Tokens only: five new ones, one changed, one gone."""
    for number in range(5):
        draft.set_token({"type": "acme-note", "keyslots": [], "text": f"note {number}" * 20})
    draft.set_token({"type": "acme-note", "keyslots": ["0", "1"], "text": "after"}, 2)
    draft.remove_token(1)


def _cut(before: Simulation, operate: Callable[[Simulation], object], epoch: int, part: float = 0.5) -> None:
    """Leave the volume as a power cut in that epoch leaves it; ``part`` picks one of the states."""
    start, sector = before.disk.content, before.disk.sector_size
    trial = type(before)(start, sector_size=sector)
    operate(trial)
    enumeration = Enumeration(start, trial.disk.epochs()[:-1], 2 * trial.pair.hdr_size, sector)
    states = list(enumeration.crashes([epoch]))
    image = states[int(part * (len(states) - 1))].image(enumeration.starts[epoch])
    before.disk.replace(0, bytes(image))


def _wipe_cut(simulation: Simulation) -> None:
    enroll(simulation)
    _cut(simulation, rotate, 3)


def _record_cut(simulation: Simulation) -> None:
    """A removal that was cut in its wipe: the intent is in a record of its own."""
    enroll(simulation)
    _cut(simulation, lambda s: s.remove(MAIN), 2)


def _torn(simulation: Simulation) -> None:
    """The primary header is torn."""
    simulation.disk.replace(4096, bytes(simulation.disk.sector_size))


def _then(*steps: Callable[[Simulation], object]) -> Callable[[Simulation], None]:
    def prepare(simulation: Simulation) -> None:
        for step in steps:
            step(simulation)

    return prepare


def _first_header(simulation: Simulation) -> None:
    """A rotation that was cut behind its first header write."""
    enroll(simulation)
    _cut(simulation, rotate, 2, 0)


#: Backups that were made while volumes were prepared, by the header of the volume that they are to be restored to.
_BACKUPS: Final[dict[bytes, bytes]] = {}


def _backup_then(*changes: Callable[[Simulation], object]) -> Callable[[Simulation], None]:
    """Enrol a key, back the header up, then change the volume."""

    def prepare(simulation: Simulation) -> None:
        enroll(simulation)
        files = SimFiles()
        run(Headers(simulation.host, files).backup(simulation.ref, "backup"))
        for change in changes:
            change(simulation)
        _BACKUPS[simulation.pair.raw] = files.content["backup"]

    return prepare


def backup_for(headers: bytes) -> bytes:
    """The backup that a prepared volume with these header bytes is to get."""
    return _BACKUPS[headers]


def _restore(simulation: Simulation) -> None:
    files = SimFiles()
    files.content["backup"] = backup_for(run(simulation.volumes.look(simulation.ref)).pair.raw)
    headers = Headers(simulation.host, files)
    run(headers.restore(simulation.ref, run(headers.compare(simulation.ref, "backup"))))


#: By name, as the table prints it.
VERBS: Final[Mapping[str, Verb]] = {
    "enrolment": Verb(enroll, use_case="enroll"),
    "rotation": Verb(rotate, enroll, use_case="rotate"),
    "rotation, unlocked by the old key": Verb(lambda s: s.rotate(OLD, NEW, **NEW_DATA), enroll),
    "staging": Verb(lambda s: s.stage(MAIN, NEW, **NEW_DATA), enroll, use_case="stage"),
    "finish": Verb(Simulation.finish, stage, use_case="finish"),
    "abort": Verb(Simulation.abort, stage, use_case="abort"),
    "removal": Verb(lambda s: s.remove(MAIN), enroll, use_case="remove"),
    "other associated data": Verb(lambda s: s.set_data(ref="vault/1, moved"), enroll, use_case="set_data"),
    "adoption of a plain keyslot": Verb(_adopt, use_case="adopt"),
    "adoption of a systemd-recovery keyslot": Verb(_adopt, _recovery_token),
    "release": Verb(Simulation.release, _adopt, releases=True, use_case="release"),
    "release to systemd-recovery": Verb(Simulation.release, _adopted),
    "recreation of the token": Verb(lambda s: s.recreate(OLD_DATA, unlock=OLD), _token_lost, use_case="recreate"),
    "recreation of the pair": Verb(lambda s: s.recreate(NEW_DATA, unlock=MAIN, new=NEW), _keyslot_lost),
    "recreation by the volume key": Verb(
        lambda s: s.recreate(NEW_DATA, volume_key=s.volume_key(), new=NEW), _keyslot_lost
    ),
    "transaction: keyslots and tokens exchanged": Verb(
        lambda s: s.transaction(_exchange, unlock=MAIN, new=NEW, third=THIRD), _foreign_tokens
    ),
    "transaction: two keyslots and their tokens gone": Verb(
        lambda s: s.transaction(_dismantle, unlock=MAIN), _foreign_tokens
    ),
    "transaction: tokens only": Verb(lambda s: s.transaction(_annotate), _foreign_tokens),
    "reconcile of a pending wipe": Verb(Simulation.reconcile, _wipe_cut, use_case="reconcile"),
    "reconcile of a wipe record": Verb(Simulation.reconcile, _record_cut),
    "reconcile of a torn header": Verb(Simulation.reconcile, _then(_wipe_cut, _torn)),
    "reconcile of a rotation cut between its headers": Verb(Simulation.reconcile, _first_header),
    "reconcile of a token without keyslot": Verb(Simulation.reconcile, _keyslot_lost),
    "header restore": Verb(_restore, _backup_then(rotate)),
    "header restore, a keyslot moved": Verb(
        _restore, _backup_then(rotate, lambda s: s.rotate(MAIN, THIRD, ref="vault/3"))
    ),
    "header restore, other tokens": Verb(_restore, _backup_then(lambda s: s.set_data(ref="vault/1, moved"))),
    "scrub": Verb(lambda s: run(s.volumes.scrub(s.ref)), enroll, use_case="scrub"),
    "rotation that heals first": Verb(rotate, _then(enroll, _torn)),
    "rotation that wipes first": Verb(lambda s: s.rotate(MAIN, THIRD, ref="vault/3"), _wipe_cut),
}


def described(token: Mapping[str, object]) -> str | None:
    """Which secret a token tells how to get; ``None`` for a token that is no description."""
    data = token.get("data", token)
    reference = data.get("ref") if isinstance(data, Mapping) else None
    return DESCRIBED.get(reference) if isinstance(reference, str) else None


@functools.cache
def simulated(name: str, *, sector: int = 512, hdr_size: int = HDR_SIZE, key_size: int = KEY_SIZE) -> Scenario:
    """A verb's operation recorded on a simulated volume; ``key_size`` in bytes."""
    verb = VERBS[name]
    simulation = Simulation(make_volume(ORDINARY, hdr_size=hdr_size, key_size=key_size), sector_size=sector)
    verb.prepare(simulation)
    return record(simulation.disk.content, verb.operate, sector, releases=verb.releases)
