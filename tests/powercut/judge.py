# SPDX-License-Identifier: GPL-2.0-or-later
"""Judges the states of a recording, from outside, by the cryptsetup command.

Of our own transactions each state must be right three times:

1. *as the initramfs finds it*: with both header copies, and with each valid one alone, each volume says exactly what it
   said before the step that was cut or what it says after it, and exactly the keys of that side open; where the step
   was marked as done, only what it says after it;
2. *after the reconcile unit's command*, which must end well, the same; copies equal, no wipe intent left, no keyslot
   without a token, no token without its keyslot, no second pair, no old key's area intact; the sequence number has
   risen with what has changed;
3. *after that command has run again*, which must say that the volume is clean and write nothing.

A step that is not atomic must at least leave a key that its token leads to, and no keyslot without a token, before 2.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final, Self

from luksrotd.errors import LuksrotdError
from luksrotd.rotation.invariants import check_sequence
from luksrotd.rotation.view import view
from tests.powercut.bench import Bench
from tests.powercut.disk import MARKS, mark_of
from tests.powercut.launcher import Ended, Launcher
from tests.powercut.recording import Recording
from tests.powercut.states import SECTOR, Part, Timeline
from tests.powercut.stock import Stock
from tests.support.crash import Image
from tests.support.crashjudge import pair_of
from tests.support.leftovers import Classifier, Instance, Leftover
from tests.support.oracle import Oracle

#: What no cut may leave, in steps neither.
ALWAYS_WRONG: Final = frozenset({Leftover.LOST, Leftover.NO_BACKUP, Leftover.LEAKED, Leftover.OTHER_KEY})
#: Of so many states in a row, one is reconciled by the program itself, not by its ``main`` in a fork.
EXECUTABLE_EVERY: Final = 50
#: What the command says of a volume in which there was nothing to do.
CLEAN: Final = ": clean"


@dataclass(slots=True)
class Verdict:
    """What was found in a state.  ``wrong``: violations; ``before``, ``after``: what the cut and reconcile leave."""

    name: str
    wrong: list[str] = field(default_factory=list)
    before: frozenset[Leftover] = frozenset()
    after: frozenset[Leftover] = frozenset()
    mounted: bool = True
    repaired: bool = False
    executable: bool = False


@dataclass(slots=True)
class _Volume:
    """What is known of one volume of the recording; ``oracles``: by the number of the last mark."""

    part: Part
    base: bytes
    tool: Stock
    moments: Sequence[Image]
    classifiers: list[Classifier] = field(default_factory=list)
    oracles: list[Oracle] = field(default_factory=list)
    mended: list[Oracle] = field(default_factory=list)

    def image(self, disk: Image) -> Image:
        """The volume in a state of the disk."""
        first, last = self.part.offset // SECTOR, (self.part.offset + self.part.size) // SECTOR
        return Image(self.base, SECTOR, {n - first: data for n, data in disk.changes.items() if first <= n < last})

    def now(self, content: bytes) -> Image:
        """The volume with that content."""
        changes: dict[int, bytes] = {}
        for block in range(0, len(content), 4096):
            if content[block : block + 4096] != self.base[block : block + 4096]:
                numbers = range(block // SECTOR, (block + 4096) // SECTOR)
                changes |= {n: content[n * SECTOR : (n + 1) * SECTOR] for n in numbers}
        return Image(self.base, SECTOR, changes)


class Judge:
    """Judges states of one recording; to be used as a context manager, in a process with mounts of its own."""

    def __init__(self, recording: Recording, timeline: Timeline, launcher: Launcher) -> None:
        self._recording = recording
        self._timeline = timeline
        self._marks = [None, *recording.scenario.steps]
        self._moments = recording.moments()
        with ExitStack() as closing:
            self._bench = closing.enter_context(Bench(recording.base, timeline.parts, launcher))
            self._volumes = [self._volume(part, base, closing) for part, base in self._bases()]
            self._closing = closing.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def judge(self, name: str, *, executable: bool = False) -> Verdict:
        """What is wrong with the state of that name."""
        image = self._timeline.image(self._timeline.cut(name))
        scenario, verdict = self._recording.scenario, Verdict(name)
        step = self._step(image)
        views = [volume.image(image) for volume in self._volumes]
        for volume, seen in zip(self._volumes, views, strict=True):
            if scenario.ours and scenario.atomic:
                verdict.wrong += [f"{volume.part.name}: {what}" for what in volume.oracles[step].judge(seen)]
            verdict.before |= _kinds(volume.classifiers[step].classify(seen))
        if not scenario.ours:
            verdict.wrong += sorted(map(str, verdict.before - {Leftover.GHOST}))
            return verdict
        verdict.wrong += sorted(map(str, verdict.before & ALWAYS_WRONG))
        verdict.executable = executable
        self._reconcile(image, views, step, verdict)
        return verdict

    def _reconcile(self, image: Image, views: Sequence[Image], step: int, verdict: Verdict) -> None:
        bench = self._bench
        bench.put(image)
        found = self._contents()
        with bench.booted() as verdict.mounted:
            files = bench.files()
            first = bench.reconcile(executable=verdict.executable)
            verdict.wrong += [f"reconcile: {what}" for what in _ill(first)]
            contents, kept = self._contents(), bench.files()
            # What found nothing to do, and did nothing, would find the same again.
            if verdict.executable or list(_ill(first, clean=True)) or (found, files) != (contents, kept):
                verdict.wrong += [f"second reconcile: {what}" for what in _ill(bench.reconcile(), clean=True)]
                if contents != self._contents():
                    verdict.wrong.append("second reconcile: it writes to a volume")
                if kept != bench.files():
                    verdict.wrong.append("second reconcile: it writes to the state directory")
        for volume, seen, content in zip(self._volumes, views, contents, strict=True):
            now = volume.now(content)
            verdict.repaired |= now.key != seen.key
            verdict.wrong += [
                f"{volume.part.name}, reconciled: {what}" for what in self._ended(volume, step, seen, now)
            ]
            verdict.after |= _kinds(volume.classifiers[step].classify(now))
        verdict.wrong += [f"reconciled: {kind}" for kind in sorted(map(str, verdict.after - {Leftover.GHOST}))]

    def _ended(self, volume: _Volume, step: int, seen: Image, now: Image) -> Iterator[str]:
        yield from volume.mended[step].judge(now)
        try:
            before, after = pair_of(seen), pair_of(now)
        except LuksrotdError as error:
            yield f"lost: {error.message}"
            return
        if not after.agree:
            yield "the header copies differ"
        if view(after).pending:
            yield "a wipe intent is left"
        changed = not before.winner.same_content(after.winner)
        yield from (f"{broken.invariant}: {broken.what}" for broken in check_sequence(before, after, changed=changed))

    def _contents(self) -> list[bytes]:
        return [self._bench.read(volume.part) for volume in self._volumes]

    def _step(self, image: Image) -> int:
        """How many steps had been marked as done."""
        mark = mark_of(image.read(MARKS.offset, SECTOR))
        return self._marks.index(mark) if mark in self._marks else 0

    def _bases(self) -> Iterator[tuple[Part, bytes]]:
        base = self._recording.base
        return ((part, base[part.offset : part.offset + part.size]) for part in self._recording.volumes)

    def _volume(self, part: Part, base: bytes, closing: ExitStack) -> _Volume:
        secrets = {name: text.encode() for name, text in self._recording.facts.secrets.items()}
        tool = Stock(base, 2 * pair_of(base).hdr_size, secrets)
        closing.enter_context(tool)
        volume = _Volume(part, base, tool, ())
        volume.moments = [volume.image(moment) for moment in self._moments]
        last = len(volume.moments) - 1
        for number, moment in enumerate(volume.moments):
            then = volume.moments[min(number + 1, last)]
            volume.classifiers.append(Classifier(tool, moment, then, intended=self._recording.scenario.ours))
            volume.oracles.append(Oracle(tool, moment, then))
            volume.mended.append(Oracle(tool, moment, then))
        return volume

    def learn(self) -> None:
        """Also allow what reconcile makes of the quiet moments; to be called once, before the first state."""
        if not self._recording.scenario.ours:
            return
        for number, moment in enumerate(self._moments):
            self._bench.put(moment)
            with self._bench.booted():
                self._bench.reconcile()
                contents = self._contents()
            for volume, content in zip(self._volumes, contents, strict=True):
                for oracle in volume.mended[max(number - 1, 0) : number + 1]:
                    oracle.also(volume.now(content))


def _ill(ended: Sequence[Ended], *, clean: bool = False) -> Iterator[str]:
    for one in ended:
        if one.status:
            yield f"exit status {one.status}: {one.said.strip()}"
        elif clean and CLEAN not in one.said:
            yield f"not clean: {one.said.strip()}"


def _kinds(instances: frozenset[Instance]) -> frozenset[Leftover]:
    return frozenset(kind for kind, _ in instances)
