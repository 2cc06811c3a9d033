# SPDX-License-Identifier: GPL-2.0-or-later
"""Shadows that are not what was asked for: the planner refuses them, or its plan keeps the invariants."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random
from typing import Any, Final

from luksrotd.errors import ConsistencyError
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.pair import Pair
from luksrotd.rotation import adoption, keys, reconcile, staging
from luksrotd.rotation.adoption import AdoptRequest
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import PBKDF_FOR_RANDOM_KEYS
from luksrotd.rotation.invariants import (
    Expectation,
    Opener,
    Standing,
    check_instant,
    check_sequence,
    check_write,
    foreign_parts,
    opener,
)
from luksrotd.rotation.keys import EnrollRequest, RotateRequest
from luksrotd.rotation.plan import ShadowResult, plan_commit
from luksrotd.rotation.protocol import BLOCK, CommitPlan, Phase
from luksrotd.rotation.staging import StageRequest
from luksrotd.rotation.token import Group, KeyState
from luksrotd.rotation.view import DeviceView
from tests.support import forge, hostile, mutation
from tests.support.planning import FRESH, KEEP, OLD, after, noise, shadowed, volume
from tests.support.simengine import make_volume

NOW: Final = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
ROTATE: Final = RotateRequest({"ref": "vault/2"}, NOW, PBKDF_FOR_RANDOM_KEYS)


@dataclass(frozen=True)
class Case:
    """A volume, a change of it, the shadow that an honest worker leaves, and the volume after that commit."""

    name: str
    image: bytes
    change: Change
    honest: ShadowResult
    done: bytes


def cases() -> tuple[Case, ...]:
    """One for each kind of change."""
    plain, staged = volume(), _staged()
    enroll = EnrollRequest({"ref": "vault/1"}, NOW, PBKDF_FOR_RANDOM_KEYS)
    recovery = {"type": "systemd-recovery", "keyslots": ["0"]}
    foreign = forge.edited(plain, lambda raw: raw["tokens"].update({"4": recovery}))
    pending = forge.with_token(plain, 1, wipe=forge.intent(Extent(40960, 8192)))
    decisions: tuple[tuple[str, bytes, Callable[[DeviceView], Change | None]], ...] = (
        ("enroll", make_volume([KEEP]), lambda seen: keys.enroll(seen, enroll)),
        ("rotate", plain, lambda seen: keys.rotate(seen, ROTATE)),
        ("rotate-beside-others", foreign, lambda seen: keys.rotate(seen, ROTATE)),
        ("remove", plain, lambda seen: keys.remove(seen, "backup")),
        ("set-data", plain, lambda seen: keys.set_data(seen, "backup", {"ref": "vault/3"})),
        ("stage", plain, lambda seen: staging.stage(seen, StageRequest(ROTATE, NOW, Group("set", 2)))),
        ("finish", staged, lambda seen: staging.finish(seen, "backup")),
        ("abort", staged, lambda seen: staging.abort(seen, "backup")),
        ("adopt", foreign, lambda seen: adoption.adopt(seen, AdoptRequest(0, {}, NOW, "taken"))),
        ("repair", pending, reconcile.repair),
    )
    return tuple(_case(*decision) for decision in decisions)


def altered_shadow(rng: Random, case: Case) -> ShadowResult:
    """What a mad worker may leave instead."""
    result = case.honest
    for _ in range(rng.choice((1, 1, 2, 3))):
        result = rng.choice(_KINDS)(rng, case, result)
    return result


def check_plan(case: Case, shadow: ShadowResult) -> CommitPlan | None:
    """The plan for such a shadow, all of whose writes keep the invariants; ``None`` if it is refused."""
    before = forge.pair_of(case.image)
    try:
        plan = plan_commit(before, case.change, shadow, noise)
    except ConsistencyError as error:
        hostile.check_message(error.message)
        return None
    assert (plan.base, plan.committed, plan.final) == (before.raw, shadow.committed, shadow.final)
    expected = _expectation(case, after(case.image, plan))
    state = case.image
    for step in plan.steps:
        there = forge.pair_of(state)
        for write in step.writes:
            assert write.offset % BLOCK == len(write.data) % BLOCK == 0
            assert write.data
            _check_place(case, there, step.phase, write.extent)
            state = forge.put(state, write.offset, write.data)
        now = forge.pair_of(state)
        assert check_sequence(there, now, changed=False) == ()
        assert check_instant(now, _reader(state), expected) == (), step.phase
    assert state[: len(plan.final)] == plan.final
    assert _content(forge.pair_of(state)) == _content(forge.pair_of(case.done))
    for headers in (plan.committed, plan.final):
        read = hostile.libcryptsetup_reads(headers, len(case.image))
        assert read == forge.pair_of(headers.ljust(len(case.image), b"\0")).winner.metadata.raw
    return plan


def _case(name: str, image: bytes, decide: Callable[[DeviceView], Change | None]) -> Case:
    change = decide(forge.view_of(image))
    assert change is not None
    honest = shadowed(image, change)
    done = after(image, plan_commit(forge.pair_of(image), change, honest, noise))
    case = Case(name, image, change, honest, done)
    assert check_plan(case, case.honest) is not None
    return case


def _staged() -> bytes:
    image = make_volume([KEEP, OLD, FRESH])
    image = forge.with_token(image, 1, 0)
    return forge.with_token(image, 2, 1, generation=2, state="staged", expires_at="2026-09-09T09:09:09Z")


# -- what a mad worker does ------------------------------------------------------------------------------------------


def _headers(rng: Random, case: Case, result: ShadowResult) -> ShadowResult:
    """Other headers, after the edits, after the closing edits, or in the same way after both."""
    seed = rng.random()
    which = rng.choice(("committed", "final", "both"))
    committed, final = result.committed, result.final
    if which != "final":
        committed = _mutated(Random(seed), committed)
    if which != "committed":
        final = _mutated(Random(seed), final)
    return dataclasses.replace(result, committed=committed, final=final)


def _mutated(rng: Random, headers: bytes) -> bytes:
    altered = mutation.altered(rng, headers, 2)
    return altered if rng.random() < 0.5 else mutation.altered(rng, altered, 1)


def _swapped(rng: Random, case: Case, result: ShadowResult) -> ShadowResult:
    before = forge.pair_of(case.image).raw
    images = (before, result.committed, result.final)
    return dataclasses.replace(result, committed=rng.choice(images), final=rng.choice(images))


def _alike(rng: Random, case: Case, result: ShadowResult) -> ShadowResult:
    """One value is another one, or one more, in all four copies alike."""
    raw = _json(result.committed)
    places = list(mutation.paths(raw))
    if not places:
        return result
    path, seed, beside = rng.choice(places), rng.random(), rng.random() < 0.2

    def edit(raw: Any) -> None:
        alike = Random(seed)
        try:
            for key in path[:-1]:
                raw = raw[key]
            name = alike.choice(mutation.NAMES) if beside and isinstance(raw, dict) else path[-1]
            kind = mutation.near if seed < 0.5 else mutation.altered_json
            raw[name] = kind(alike, raw[path[-1]])
        except (AttributeError, KeyError, IndexError, TypeError):
            return  # not there in this copy

    return dataclasses.replace(result, committed=_edited(result.committed, edit), final=_edited(result.final, edit))


def _moved(rng: Random, case: Case, result: ShadowResult) -> ShadowResult:
    """A keyslot, new or old, in another place or of another size, in all four copies alike."""
    added = [edit.keyslot for edit in case.change.added]
    number, size = str(rng.choice((*range(4), *added, *added))), rng.choice((512, 4096, 4096, 4096, 8192, 65536))
    taken = [area.offset for area in forge.pair_of(case.image).referenced]
    offset = rng.choice((*taken, 32768 + 4096 * rng.randrange(-1, 10))) + rng.choice((0, 0, 0, 0, 512))

    def edit(raw: Any) -> None:
        try:
            raw["keyslots"][number]["area"].update(offset=str(offset), size=str(size))
        except (AttributeError, KeyError, TypeError):
            return  # not there in this copy

    return dataclasses.replace(result, committed=_edited(result.committed, edit), final=_edited(result.final, edit))


def _edited(headers: bytes, edit: Callable[[Any], None]) -> bytes:
    raw = _json(headers)
    edit(raw)
    return headers if raw is None else forge.with_json(headers, raw)


def _json(headers: bytes) -> Any:
    """The JSON of the primary copy; nothing if it has been altered beyond that."""
    try:
        return forge.json_of(headers)
    except (ValueError, RecursionError):
        return None


def _data(rng: Random, case: Case, result: ShadowResult) -> ShadowResult:
    data = {extent: mutation.altered_bytes(rng, content) for extent, content in result.data.items()}
    return dataclasses.replace(result, data={e: c[: e.size].ljust(e.size, b"\0") for e, c in data.items()})


def _copied(rng: Random, case: Case, result: ShadowResult) -> ShadowResult:
    """Other bytes are said to have been copied in."""
    initial = {extent: mutation.altered_bytes(rng, content) for extent, content in result.initial.items()}
    return dataclasses.replace(result, initial={e: c[: e.size].ljust(e.size, b"\0") for e, c in initial.items()})


_KINDS: Final = (_headers, _headers, _alike, _alike, _alike, _moved, _moved, _swapped, _data, _copied)


# -- what must hold --------------------------------------------------------------------------------------------------


def _check_place(case: Case, there: Pair, phase: Phase, extent: Extent) -> None:
    headers, space = Extent(0, len(there.raw)), there.winner.metadata.keyslots_area
    if phase in (Phase.NEW_AREA, Phase.WIPE_OLD):
        assert space.contains(extent), f"{phase} writes outside of the keyslots area: {extent}"
        assert check_write(there, extent) == ()
    else:
        assert headers.contains(extent), f"{phase} writes outside of the headers: {extent}"


def _expectation(case: Case, done: bytes) -> Expectation:
    """Who must still open is taken from before; what the new key is, from after: its area is anything to us."""
    first, last = forge.view_of(case.image), forge.view_of(done)
    names = {key.token.name for key in (*first.keys, *last.keys)}
    honest = forge.view_of(case.done)
    return Expectation(
        keep={
            f"keyslot {number}": opener(slot, _reader(case.image))
            for number, slot in first.metadata.keyslots.items()
            if number not in case.change.destroyed
        },
        keys={name: _openers(first, name, case.image) | _openers(last, name, done) for name in names},
        allowed={name: frozenset({_standing(first, name), _standing(honest, name)}) for name in names},
        foreign=(foreign_parts(first.pair.winner), foreign_parts(honest.pair.winner)),
    )


def _openers(seen: DeviceView, name: str, image: bytes) -> dict[int, Opener]:
    return {
        key.token.generation: opener(key.keyslot, _reader(image)) for key in seen.named(name) if key.keyslot is not None
    }


def _standing(seen: DeviceView, name: str) -> Standing:
    def generation(state: KeyState) -> int:
        return max((key.token.generation for key in seen.named(name) if key.token.state is state), default=0)

    return generation(KeyState.ACTIVE), generation(KeyState.STAGED)


_CHOSEN: Final = {
    "kdf": ("salt",),
    "af": ("hash",),
    "area": ("offset", "size", "encryption", "key_size"),
}


def _content(pair: Pair) -> Any:
    """What the volume says but for what libcryptsetup chooses of a new keyslot: salt, place, ciphers, hashes."""
    raw = forge.json_of(pair.raw)
    for keyslot in raw["keyslots"].values():
        for part, members in _CHOSEN.items():
            keyslot[part] |= dict.fromkeys(members)
    for token in raw["tokens"].values():
        token.pop("fingerprint", None)
    return raw


def _reader(image: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, size: image[offset : offset + size]
