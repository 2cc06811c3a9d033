# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences of our verbs, of other tools' commands, of power cuts and of I/O errors, against a model.

The model is ``world.World``, and what may be true now is a set of worlds: one, until something is cut; then what was
before and what is after, until a reconcile, or the next verb, has brought the volume to one of them.  After every
step each valid header copy, alone, must show one of them, exactly.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from luksrotd.errors import DeviceError, LuksrotdError, MetadataFull, NoFreeArea, NoFreeKeyslot, Outcome
from luksrotd.luks2.pair import HeaderCopy, Pair, parse_pair
from luksrotd.rotation.edits import NEW, UNLOCK, AddKeyslot, DestroyKeyslot, Edit, RemoveToken, SetToken
from luksrotd.rotation.invariants import foreign_parts
from luksrotd.rotation.reconcile import Action
from luksrotd.rotation.view import view
from luksrotd.service.draft import begin
from tests.faults.matrix import leaks
from tests.model.world import LOST, Key, World, observe
from tests.support.crash import Enumeration
from tests.support.simdisk import Faults, SimDisk, epochs_of
from tests.support.simengine import SimEngine, SimSession, make_volume, material
from tests.support.simshadow import SimShadow
from tests.support.simulation import CHEAP, Simulation, run, secrets

NAMES = st.sampled_from(["backup", "second"])
#: What happens to a verb: nothing, a power cut at some write, or an I/O error at some write or flush.
FATES = st.one_of(
    st.just(("whole", 0)),
    st.tuples(st.sampled_from(["cut", "write", "flush"]), st.integers(0, 2**16)),
)
FULL = (NoFreeArea, NoFreeKeyslot, MetadataFull)

Fate = tuple[str, int]
Change = Callable[[World], object]


class Volume(RuleBasedStateMachine):
    """One simulated volume; ``worlds`` are those that it may be in, the surest last."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.secrets: dict[str, bytes] = {}
        self.worlds: list[World] = []
        self.foreign: list[Any] = []
        self.retired: dict[bytes, str] = {}
        """Key material that was in force once, by the name of its secret."""
        self.seqid = 0
        self.settled = True

    # -- what another kind of host does otherwise ----------------------------------------------------------------

    def host(self, content: bytes) -> Simulation:
        """A machine that has just been started."""
        self.steps += 1
        return Simulation(content, seed=self.steps)

    def format(self) -> bytes:
        """A new volume, opened by ``main``."""
        return make_volume([self.secret("main")], areas=10)

    def openers(self, content: bytes) -> Callable[[HeaderCopy], dict[int, str]]:
        """Who opens which keyslot of a copy."""

        def found(copy: HeaderCopy) -> dict[int, str]:
            opened = {}
            for slot in copy.metadata.keyslots.values():
                there = content[slot.area.offset : slot.area.end]
                for name, secret in self.secrets.items():
                    if there == material(secret, slot.kdf_salt or ""):
                        opened[slot.id] = name
            return opened

        return found

    def stranger(self, *edits: Edit, new: bytes = b"") -> None:
        """What cryptsetup does: changes the header as libcryptsetup would, and all of it is on the medium."""
        disk = self.simulation.disk
        shadow = SimShadow(len(disk.cached))
        shadow.write(0, disk.content)
        session = SimSession(SimEngine(1000 + self.steps), shadow, {UNLOCK: self.secrets["main"], NEW: new})
        run(session.unlock())
        run(session.apply(edits))
        disk.replace(0, shadow.read(0, shadow.length))

    # -- the rules -----------------------------------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        """One passphrase, nothing of ours."""
        self.simulation = self.host(self.format())
        self.worlds = [World({"main"})]
        self.foreign = [self._foreign()]

    def secret(self, name: str = "") -> bytes:
        """A secret that was never used before."""
        name = name or f"s{len(self.secrets)}"
        self.secrets[name] = name.encode() * 3
        return self.secrets[name]

    @property
    def likely(self) -> World:
        """The world that the last verb wanted."""
        return self.worlds[-1] if self.worlds else World()

    @property
    def now(self) -> World:
        """The world that the winning copy shows."""
        pair, content = self._seen()
        return observe(pair.winner, pair, self.openers(content))

    @rule(name=NAMES, fate=FATES)
    def enroll(self, name: str, fate: Fate) -> None:
        """A new managed key."""
        if name in {**self.now.active, **self.now.staged}:
            return
        ref = self._new()
        self.verb(
            fate,
            lambda s, given: s.volumes.enroll(s.ref, given, data={"ref": ref}, pbkdf=CHEAP, name=name),
            lambda world: (world.opens.add(ref), world.active.update({name: Key(1, ref, ref)})),
            {UNLOCK: "main", NEW: ref},
        )

    @precondition(lambda self: self.likely.active)
    @rule(name=NAMES, fate=FATES, by_itself=st.booleans())
    def rotate(self, name: str, fate: Fate, by_itself: bool) -> None:
        """A new generation in place of the old one."""
        old = self._whole(name)
        if old is None:
            return
        ref = self._new()

        def change(world: World) -> None:
            world.opens ^= {old.secret, ref}
            world.active[name] = Key(old.generation + 1, ref, ref)

        self.verb(
            fate,
            lambda s, given: s.volumes.rotate(s.ref, given, data={"ref": ref}, pbkdf=CHEAP, name=name),
            change,
            {UNLOCK: old.secret if by_itself else "main", NEW: ref},
        )

    @precondition(lambda self: self.likely.active)
    @rule(name=NAMES, fate=FATES)
    def stage(self, name: str, fate: Fate) -> None:
        """A new generation beside the old one."""
        old = self._whole(name)
        if old is None:
            return
        ref = self._new()
        self.verb(
            fate,
            lambda s, given: s.volumes.stage(s.ref, given, data={"ref": ref}, pbkdf=CHEAP, name=name),
            lambda world: (world.opens.add(ref), world.staged.update({name: Key(old.generation + 1, ref, ref)})),
            {UNLOCK: "main", NEW: ref},
        )

    @precondition(lambda self: self.likely.staged)
    @rule(name=NAMES, fate=FATES)
    def finish(self, name: str, fate: Fate) -> None:
        """The old one goes."""
        if name not in self.now.staged:
            return

        def change(world: World) -> None:
            world.opens -= {world.active[name].secret}
            world.active[name] = world.staged.pop(name)

        self.verb(fate, lambda s, _: s.volumes.finish(s.ref, name=name), change)

    @precondition(lambda self: self.likely.staged)
    @rule(name=NAMES, fate=FATES)
    def abort(self, name: str, fate: Fate) -> None:
        """The new one goes."""
        if name not in self.now.staged:
            return
        self.verb(
            fate,
            lambda s, _: s.volumes.abort(s.ref, name=name),
            lambda world: world.opens.discard(world.staged.pop(name).secret),
        )

    @precondition(lambda self: self.likely.active)
    @rule(name=NAMES, fate=FATES)
    def remove(self, name: str, fate: Fate) -> None:
        """The key goes."""
        if self._whole(name) is None:
            return
        self.verb(
            fate,
            lambda s, given: s.volumes.remove(s.ref, given, name=name),
            lambda world: world.opens.discard(world.active.pop(name).secret),
            {UNLOCK: "main"},
        )

    @precondition(lambda self: self.likely.active)
    @rule(name=NAMES, fate=FATES)
    def set_data(self, name: str, fate: Fate) -> None:
        """Other associated data."""
        if self._whole(name) is None:
            return
        ref = f"moved {self.steps}"

        def change(world: World) -> None:
            world.active[name].ref = ref

        self.verb(fate, lambda s, _: s.volumes.set_data(s.ref, {"ref": ref}, name=name), change)

    @rule(name=NAMES, fate=FATES, number=st.integers(0, 9))
    def adopt(self, name: str, fate: Fate, number: int) -> None:
        """An ordinary keyslot becomes ours."""
        world = self.now
        loose = sorted(view(self._seen()[0]).ordinary)
        if name in {**world.active, **world.staged} or not loose:
            return
        keyslot = loose[number % len(loose)]
        secret = self._openers()[keyslot]
        if secret == "main":
            return
        self.verb(
            fate,
            lambda s, _: s.volumes.adopt(s.ref, keyslot, data={"ref": "adopted"}, name=name),
            lambda after: after.active.update({name: Key(1, secret, "adopted")}),
            foreign=True,
        )

    @precondition(lambda self: self.likely.active)
    @rule(name=NAMES, fate=FATES)
    def release(self, name: str, fate: Fate) -> None:
        """It becomes an ordinary one."""
        if self._whole(name) is None:
            return
        self.verb(
            fate, lambda s, _: s.volumes.release(s.ref, name=name), lambda world: world.active.pop(name), foreign=True
        )

    @precondition(lambda self: LOST in {key.secret for key in self.likely.active.values()})
    @rule(name=NAMES, fate=FATES)
    def recreate(self, name: str, fate: Fate) -> None:
        """The keyslot is lost: a new pair."""
        world = self.now
        if name not in world.active or world.active[name].secret != LOST or name in world.staged:
            return
        ref, generation = self._new(), world.active[name].generation + 1
        self.verb(
            fate,
            lambda s, given: s.volumes.recreate(s.ref, given, data={"ref": ref}, pbkdf=CHEAP, name=name),
            lambda after: (after.opens.add(ref), after.active.update({name: Key(generation, ref, ref)})),
            {UNLOCK: "main", NEW: ref},
        )

    @precondition(lambda self: self.settled)
    @rule(fate=FATES, kill=st.booleans(), keep=st.booleans())
    def transaction(self, fate: Fate, kill: bool, keep: bool) -> None:
        """A keyslot with a token of another kind comes; an ordinary one and tokens may go: one commit."""
        world, pair = self.now, self._seen()[0]
        opened = self._openers()
        victims = [slot for slot in view(pair).ordinary if opened[slot] != "main"][: int(kill)]
        tokens = [] if keep else [number for number, raw in world.tokens.items() if not raw["keyslots"]]
        name = self._new()
        added = {"type": "note", "keyslots": [], "text": name}
        placed: list[int] = []

        async def compose(s: Simulation, given: Any) -> None:
            transaction = await begin(s.host, s.ref)
            transaction.draft.add_keyslot(NEW, CHEAP)
            placed.append(transaction.draft.set_token(added))
            for slot in victims:
                transaction.draft.destroy_keyslot(slot)
            for number in tokens:
                transaction.draft.remove_token(number)
            await transaction.commit(given)

        def change(after: World) -> None:
            after.opens -= {opened[slot] for slot in victims}
            after.opens.add(name)
            for number in tokens:
                del after.tokens[number]
            after.tokens[placed[-1]] = added

        self.verb(fate, compose, change, {UNLOCK: "main", NEW: name}, foreign=True)

    @rule(fate=FATES)
    def scrub(self, fate: Fate) -> None:
        """Free space is overwritten."""
        self.verb(fate, lambda s, _: s.volumes.scrub(s.ref), lambda world: None)

    @rule(fate=FATES)
    def reconcile(self, fate: Fate) -> None:
        """Everything is brought to an end; a key that has lost its keyslot is given up."""

        def change(world: World) -> None:
            for name in [name for name, key in world.active.items() if key.secret == LOST and name not in world.staged]:
                del world.active[name]

        async def work(s: Simulation, _: Any) -> None:
            done = await s.volumes.reconcile(s.ref)
            assert [finding for finding in done.left if finding.action is Action.REPAIR] == []
            again = len(s.disk.log)
            await s.volumes.reconcile(s.ref)
            assert len(s.disk.log) == again, "a second reconcile writes"

        self.verb(fate, work, change)

    @precondition(lambda self: self.settled)
    @rule()
    def stranger_adds_a_keyslot(self) -> None:
        """``cryptsetup luksAddKey``."""
        pair = self._seen()[0]
        number = view(pair).free_keyslot()
        ref = self._new()
        try:
            self.stranger(AddKeyslot(number or 0, pbkdf=CHEAP), new=self.secrets[ref])
        except FULL:
            return
        self._foreign_change(lambda world: world.opens.add(ref))

    @precondition(lambda self: self.settled)
    @rule(number=st.integers(0, 9))
    def stranger_kills_a_keyslot(self, number: int) -> None:
        """``cryptsetup luksKillSlot``: an ordinary one, or one of ours that no staged one stands beside."""
        world, opened = self.now, self._openers()
        staged = {world.active[name].secret for name in world.staged} | {key.secret for key in world.staged.values()}
        slots = sorted(slot for slot, secret in opened.items() if secret != "main" and secret not in staged)
        if not slots:
            return
        slot = slots[number % len(slots)]
        self.stranger(DestroyKeyslot(slot))

        def change(after: World) -> None:
            after.opens.discard(opened[slot])
            for key in after.active.values():
                key.secret = LOST if key.secret == opened[slot] else key.secret
            for token in after.tokens.values():
                token["keyslots"] = [each for each in token["keyslots"] if each != str(slot)]

        self._foreign_change(change)

    @precondition(lambda self: self.settled)
    @rule()
    def stranger_imports_a_token(self) -> None:
        """``cryptsetup token import``."""
        number = view(self._seen()[0]).free_token()
        if number is None or number > 5:
            return
        body = {"type": "stranger", "keyslots": ["0"], "step": self.steps}
        self.stranger(SetToken(number, body))
        self._foreign_change(lambda world: world.tokens.update({number: body}))

    @precondition(lambda self: self.settled)
    @precondition(lambda self: self.likely.tokens)
    @rule(number=st.integers(0, 9))
    def stranger_removes_a_token(self, number: int) -> None:
        """``cryptsetup token remove``."""
        numbers = sorted(self.now.tokens)
        if not numbers:
            return
        token = numbers[number % len(numbers)]
        self.stranger(RemoveToken(token))
        self._foreign_change(lambda world: world.tokens.pop(token))

    @rule(landed=st.integers(0, 3))
    def power_cut(self, landed: int) -> None:
        """Between two verbs."""
        self.simulation.disk.power_cut(landed)
        self.simulation = self.host(self.simulation.disk.content)

    # -- what must hold ------------------------------------------------------------------------------------------

    @invariant()
    def every_copy_alone_shows_a_world_that_may_be(self) -> None:
        """I1, I2, I3, I5: who must open opens, who must not does not, and nothing else has changed."""
        pair, content = self._seen()
        openers = self.openers(content)
        for copy in pair.valid:
            seen = observe(copy, pair, openers)
            assert seen in self.worlds, f"{copy.header.which} copy alone: {seen} is none of {self.worlds}"
            assert foreign_parts(copy) in self.foreign, f"{copy.header.which} copy alone: something foreign has changed"
        assert pair.winner.header.seqid >= self.seqid, "I9: the sequence number has fallen"
        self.seqid = pair.winner.header.seqid

    @invariant()
    def what_is_over_is_over(self) -> None:
        """I6: after success nothing is pending, and no retired key is left anywhere."""
        if not self.settled:
            return
        pair, content = self._seen()
        assert pair.agree
        assert view(pair).pending == ()
        for name, there in self._materials(pair, content):
            self.retired[there] = name
        opens = self.now.opens
        left = {content[offset : offset + 4096] for offset in range(len(pair.raw), len(content), 4096)}
        for there, name in self.retired.items():
            assert name in opens or there not in left, f"I6: the retired secret {name} is still on the medium"

    @invariant()
    def nothing_is_leaked(self) -> None:
        """Devices, shadows, locks, workers."""
        assert leaks(self.simulation) == []

    # -- how a verb is carried out -------------------------------------------------------------------------------

    def verb(
        self,
        fate: Fate,
        work: Callable[[Simulation, Any], Any],
        change: Change,
        named: dict[str, str] | None = None,
        *,
        foreign: bool = False,
    ) -> None:
        """Run a verb to its fate.  ``change`` is what it does to the world; ``foreign``: to other tools' parts, too."""
        kind, choice = fate
        before, disk, picked = self.now, self.simulation.disk, random.Random(choice)
        parts = self._foreign()
        base, dirty, logged = bytes(disk.durable), disk.dirty, len(disk.log)
        if kind in ("write", "flush"):
            plant(disk, kind, picked)
        error = self._attempt(work, named or {})
        disk.faults = Faults()
        if isinstance(error, FULL):
            assert disk.log[logged:] == [] or not self.settled
            self._settle_if_clean()
            return
        after = before.after(change)
        if foreign and error is None:
            parts = self._foreign()
        if isinstance(error, DeviceError):
            self._failed(error, before, after, self._foreign() if foreign else parts)
        elif error is not None:
            raise error
        elif kind == "cut":
            self.simulation = self.host(cut(base, [*dirty, *disk.log[logged:]], len(self._seen()[0].raw), picked))
            self._may_be(before, after, parts)
        else:
            self.worlds, self.foreign, self.settled = [after], [parts], True

    def _attempt(self, work: Callable[[Simulation, Any], Any], named: dict[str, str]) -> LuksrotdError | None:
        with secrets(**{name: self.secrets[secret] for name, secret in named.items()}) as given:
            try:
                run(work(self.simulation, given))
            except LuksrotdError as error:
                return error
        return None

    def _failed(self, error: DeviceError, before: World, after: World, parts: Any) -> None:
        """What was told must be true; then it may be either, until somebody has looked."""
        self._may_be(before, after, parts)
        if error.outcome is Outcome.UNCHANGED:
            assert self.now == before, "unchanged was told"
        elif error.outcome is not Outcome.UNKNOWN:
            assert self.now in (before, after), f"{error.outcome} was told"
        if error.outcome is Outcome.COMMITTED:
            assert self.now == after, "committed was told"

    def _may_be(self, before: World, after: World, parts: Any) -> None:
        for world in (before, after):
            if world not in self.worlds:
                self.worlds.append(world)
        self.foreign.append(parts)
        self._settle_if_clean()

    def _settle_if_clean(self) -> None:
        """A volume that shows nothing of a crash is in one world."""
        pair, _ = self._seen()
        self.settled = pair.agree and not view(pair).pending and not self.simulation.disk.dirty
        if self.settled:
            assert self.now in self.worlds
            self.worlds, self.foreign = [self.now], [self._foreign()]

    def _foreign_change(self, change: Change) -> None:
        self.worlds, self.foreign = [self.worlds[-1].after(change)], [self._foreign()]

    def _seen(self) -> tuple[Pair, bytes]:
        content = self.simulation.disk.medium()
        return parse_pair(content), content

    def _foreign(self) -> Any:
        return foreign_parts(self._seen()[0].winner)

    def _openers(self) -> dict[int, str]:
        pair, content = self._seen()
        return self.openers(content)(pair.winner)

    def _materials(self, pair: Pair, content: bytes) -> Iterator[tuple[str, bytes]]:
        for number, name in self._openers().items():
            area = pair.winner.metadata.keyslots[number].area
            yield name, content[area.offset : area.offset + 4096]

    def _new(self) -> str:
        self.secret()
        return next(reversed(self.secrets))

    def _whole(self, name: str) -> Key | None:
        """The active key of that name, if a verb takes it: with its keyslot, nothing staged beside it."""
        world = self.now
        key = world.active.get(name)
        return key if key is not None and key.secret != LOST and name not in world.staged else None


def plant(disk: SimDisk, kind: str, picked: random.Random) -> None:
    """Let one of the next writes or flushes fail; maybe none of them is reached."""
    number = picked.randrange(8)
    if kind == "write":
        disk.faults.writes[disk.writes + number] = picked.choice([0, 512, 3584])
    else:
        disk.faults.flushes[disk.flushes + number] = picked.randrange(2)
        disk.faults.torn = picked.randrange(8)


def cut(base: bytes, log: list[Any], headers: int, picked: random.Random) -> bytes:
    """The medium after a power cut in one epoch: of its changed sectors each is old, new or garbage."""
    epochs = [epoch for epoch in epochs_of(log) if epoch]
    if not epochs:
        return base
    enumeration = Enumeration(base, epochs, headers)
    number = picked.randrange(len(epochs))
    start, end = bytearray(bytes(enumeration.starts[number])), bytes(enumeration.starts[number + 1])
    for write in epochs[number]:
        for offset in range(write.offset, write.offset + len(write.data), 512):
            sector = slice(offset, offset + 512)
            if start[sector] != end[sector]:
                start[sector] = picked.choice([bytes(start[sector]), end[sector], picked.randbytes(512)])
    return bytes(start)
