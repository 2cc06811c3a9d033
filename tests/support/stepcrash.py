# SPDX-License-Identifier: GPL-2.0-or-later
"""The crash states of the stepwise engine: real writes of real libcryptsetup, judged by real libcryptsetup.

What must hold in every state, as it is and for each valid header copy alone: the administrator's key opens; the
generation that the header says is in force opens by its own secret; every keyslot is the administrator's or has a
token.  After reconcile: what holds after the atomic engine's operations.
"""

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Final

from luksrotd.cryptsetup.api import Context
from luksrotd.errors import FormatError, UnknownDevice
from luksrotd.host.entropy import KernelEntropy
from luksrotd.host.shadow import MemfdShadows
from luksrotd.host.worker import WorkerEngine
from luksrotd.luks2.pair import BadCopy, Pair, parse_pair, read_pair
from luksrotd.names import STEPWISE
from luksrotd.rotation.lineage import Lineage, lineage
from luksrotd.rotation.view import view
from luksrotd.service.reconciling import Reconciled
from luksrotd.service.volume import Volumes
from tests.support import stepdriver
from tests.support.crash import Enumeration
from tests.support.makeimage import make_image
from tests.support.oracle import MemoryImage, Oracle, opens_any, opens_keyslot, states
from tests.support.recorder import record
from tests.support.simulation import MAIN, NEW, OLD, Simulation, run

MIB: Final = 1024 * 1024
#: Reconciles that run at once, each with a worker process.
PARALLEL: Final = 4
#: What has to be done before each verb.
BEFORE: Final = {
    "enroll": (),
    "rotate": ("enroll",),
    "stage": ("enroll",),
    "finish": ("enroll", "stage"),
    "abort": ("enroll", "stage"),
    "remove": ("enroll",),
}
SECRETS: Final = {1: OLD, 2: NEW}


@dataclass(slots=True)
class StepOracle(Oracle):
    """As ``Oracle``, but old pairs may be there beside the one in force, in whatever state, if a token names them."""

    opening: dict[object, list[str]] = field(default_factory=dict)
    """What was found by deriving keys, which takes long: by all that it depends on."""

    def _judge_context(self, context: Context, image: MemoryImage) -> list[str]:
        wrong = []
        recovered = read_pair(image.read, image.size)
        if context.metadata() != recovered.winner.metadata.raw or not recovered.agree:
            wrong.append("libcryptsetup chose another copy than we, or did not recover the bad one")
        seen = view(recovered)
        line = lineage(seen, "backup")
        if line.unclear:
            wrong.append(line.unclear)
        if seen.ordinary != (0,):
            wrong.append(f"keyslots {seen.ordinary} without a token")
        if line.current is None and not self.may_be_absent:
            wrong.append("no generation is in force")
        known = (json.dumps(recovered.winner.metadata.raw), image.areas_digest(recovered))
        if known not in self.opening:
            self.opening[known] = list(self._openings(context, line))
        return wrong + self.opening[known]

    def _openings(self, context: Context, line: Lineage) -> Iterator[str]:
        for name, secret in self.keep.items():
            if not opens_any(context, secret):
                yield f"{name} does not open"
        for key in (line.current, line.staged):
            if key is None:
                continue
            generation = key.token.generation
            if key.keyslot is None or not opens_keyslot(context, self.generations[generation], key.keyslot.id):
                yield f"generation {generation} ({key.token.state}) does not open"


class RealReconcile(Simulation):
    """A simulated disk below, real libcryptsetup above."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        real = replace(self.host, shadows=MemfdShadows(), engine=WorkerEngine(), entropy=KernelEntropy())
        self.volumes = Volumes(real)


@dataclass(slots=True)
class StepwiseVerb:
    """One verb's crash states, and what was found wrong with them."""

    verb: str
    enumeration: Enumeration
    states: int = 0
    reconciled: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def oracle(self) -> Oracle:
        """For a state in the middle."""
        return StepOracle({"main": MAIN}, SECRETS, may_be_absent=self.verb in ("enroll", "remove"))

    def judge(self, *, until_wrong: bool = False) -> None:
        """Every state, by libcryptsetup; with ``until_wrong`` none after the first bad one."""
        oracle = self.oracle
        for crash, image in states(self.enumeration):
            self.states += 1
            try:
                self.wrong += [f"{self.verb}, epoch {crash.epoch}: {what}" for what in oracle.judge(image)]
            except (FormatError, UnknownDevice) as error:
                self.wrong.append(f"{self.verb}, epoch {crash.epoch}: lost: {error.message}")
            if until_wrong and self.wrong:
                return

    def reconcile(self) -> None:
        """Every state whose header means something else than those before it."""
        todo = self._different()
        while batch := list(islice(todo, PARALLEL)):
            for simulation, done in zip(batch, run(_reconcile_all(batch)), strict=True):
                self.reconciled += 1
                self.wrong += [f"{self.verb}, reconcile leaves {found.code}: {found.message}" for found in done.left]
                self.wrong += [f"{self.verb}, after reconcile: {what}" for what in self._after(simulation)]

    def _different(self) -> Iterator[RealReconcile]:
        seen: set[tuple[object, ...]] = set()
        for _, image in states(self.enumeration):
            content = image.read(0, image.size)
            meaning = _meaning(parse_pair(content))
            if meaning not in seen:
                seen.add(meaning)
                yield RealReconcile(content)

    def _after(self, simulation: Simulation) -> list[str]:
        """One of the two ends, with nothing left of the other."""
        content, pair = simulation.disk.content, simulation.pair
        wrong = [] if pair.agree else ["the copies differ"]
        image = MemoryImage(content, self.enumeration.headers)
        try:
            wrong += self.oracle.judge(image)
        finally:
            image.close()
        base = bytes(self.enumeration.base)
        ends = [parse_pair(end) for end in (base, self.enumeration.final)]
        if _said(pair) not in [_said(end) for end in ends]:
            wrong.append("neither as before nor as after")
        for area in ends[0].referenced:
            kept = content[area.offset : area.end] == base[area.offset : area.end]
            if kept and area not in pair.referenced:
                wrong.append("the retired area is intact")
        logged = len(simulation.disk.log)
        simulation.reconcile()
        if len(simulation.disk.log) != logged:
            wrong.append("a second reconcile writes")
        return wrong


def recorded(verb: str, directory: Path) -> StepwiseVerb:
    """``verb`` by the stepwise engine on a volume of 4 MiB in ``directory``, seen by strace."""
    image = make_image(directory / f"{verb}.img", key=MAIN, keyslots_size=2 * MIB, size=4 * MIB)
    for earlier in BEFORE[verb]:
        stepdriver.run(STEPWISE, earlier, str(image))
    command = [sys.executable, "-P", "-m", "tests.support.stepdriver", verb, str(image), STEPWISE]
    recording = record(command, image, environment={"PYTHONPATH": str(Path(__file__).parents[2])})
    assert recording.status == 0, recording.stderr.decode()
    assert not recording.epochs[-1], "the last write was not flushed"
    epochs = [epoch for epoch in recording.epochs if epoch]
    return StepwiseVerb(verb, Enumeration(recording.before, epochs, 2 * parse_pair(recording.before).hdr_size))


async def _reconcile_all(simulations: Sequence[Simulation]) -> Sequence[Reconciled]:
    return await asyncio.gather(*(each.volumes.reconcile(each.ref) for each in simulations))


def _meaning(pair: Pair) -> tuple[object, ...]:
    """All that reconcile can go by: the winner, and what the other copy is (one that is bad is never read)."""
    return (
        pair.winner.raw,
        *(copy.which if isinstance(copy, BadCopy) else copy.raw for copy in (pair.primary, pair.secondary)),
    )


def _said(pair: Pair) -> object:
    """Which generations are there, in which state, on which keyslots, and whose the other keyslots are."""
    keys = [(key.token.generation, key.token.state, key.complete, key.token.retires) for key in view(pair).keys]
    return sorted(keys), view(pair).ordinary
