# SPDX-License-Identifier: GPL-2.0-or-later
"""Judges recordings, with the luksrotd and the cryptsetup that are installed where this runs.

    python3 -m tests.powercut.inside TASK

``TASK`` is a JSON file (``Task``).  What is found goes to stdout, a JSON object a line, each a ``Result``.
"""

import itertools
import json
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import luksrotd
from tests.powercut import recording
from tests.powercut.bench import prepare_machine
from tests.powercut.judge import EXECUTABLE_EVERY, Judge, Verdict
from tests.powercut.launcher import Launcher
from tests.powercut.recording import Recording
from tests.powercut.scenarios import SCENARIOS
from tests.powercut.states import Timeline
from tests.powercut.stock import run
from tests.support.kernel import die_with_parent

#: States that a process judges before it tells of them.
CHUNK: Final = 20
#: Names in a row that give nothing new: then all states are found, or nearly.
BARREN: Final = 20000
#: A control needs fewer states: of so many, one.
CONTROL_SHARE: Final = 3
#: Violations that are told; all are counted.
TOLD: Final = 20


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be judged: folders of recordings; ``states``: how many of each, ``only``: these states alone."""

    folders: Sequence[str]
    seed: int
    states: int
    seconds: float
    processes: int
    program: Sequence[str]
    only: Sequence[str] = ()


@dataclass(slots=True)
class Result:
    """What came of one recording; counts of states, but for ``writes``, ``flushes`` and ``seconds``.

    ``tried``: names that were looked at to find ``distinct`` states; ``before`` and ``after``: states with a leftover.
    """

    scenario: str
    release: str
    folder: str
    machine: Sequence[str]
    cryptsetup: str
    luksrotd: str
    kernel: str
    writes: dict[str, int]
    flushes: int
    tried: int = 0
    distinct: int = 0
    reconciled: int = 0
    repaired: int = 0
    executed: int = 0
    unmounted: int = 0
    wrong: int = 0
    violations: list[tuple[str, list[str]]] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def main(arguments: Sequence[str]) -> int:
    """Judge; 0 whatever is found."""
    task = Task(**json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    for number, folder in enumerate(task.folders):
        begun = time.monotonic()
        share = task.seconds / (len(task.folders) - number)
        result = judged(Path(folder), task, begun + share)
        result.seconds = time.monotonic() - begun
        task = Task(**{**asdict(task), "seconds": max(task.seconds - result.seconds, 1.0)})
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
        sys.stdout.flush()
    return 0


def judged(folder: Path, task: Task, deadline: float) -> Result:
    """One recording, until the deadline."""
    recorded = recording.load(folder)
    timeline = recorded.timeline()
    result = _blank(folder, recorded, timeline)
    names = task.only or _distinct(timeline, task, result)
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    # Spawned: each has mounts of its own, and a small process to fork from.
    with multiprocessing.get_context("spawn").Pool(task.processes, _begin, (str(folder), task.program)) as pool:
        # The pool would take all chunks at once, and the deadline would mean nothing.
        room = threading.Semaphore(2 * task.processes)
        for verdicts in pool.imap_unordered(_work, _until(deadline, room, _chunks(names))):
            room.release()
            for verdict in verdicts:
                _count(result, verdict, ours=recorded.scenario.ours)
                before.update(map(str, verdict.before))
                after.update(map(str, verdict.after))
    result.violations.sort()
    result.before, result.after = dict(before), dict(after)
    return result


def _count(result: Result, verdict: Verdict, *, ours: bool) -> None:
    result.distinct += 1
    result.reconciled += ours
    result.repaired += verdict.repaired
    result.executed += verdict.executable
    result.unmounted += not verdict.mounted
    if verdict.wrong:
        result.wrong += 1
        if len(result.violations) < TOLD:
            result.violations.append((verdict.name, verdict.wrong))


def _blank(folder: Path, recorded: Recording, timeline: Timeline) -> Result:
    writes = Counter(part.name for e in timeline.epochs for w in e.writes for part in timeline.parts if part.holds(w))
    writes["data"] = sum(len(epoch.others) for epoch in timeline.epochs)
    facts = recorded.facts
    flushes = sum(request.flush for request in recorded.requests)
    told = run("--version")[1].decode().split()[1]
    version = (facts.machine, told, luksrotd.__version__, platform.release())
    return Result(facts.scenario, facts.release, str(folder), *version, dict(writes), flushes)


def _distinct(timeline: Timeline, task: Task, result: Result) -> Iterator[str]:
    """Names of states of which no two are alike."""
    seen: set[Hashable] = set()
    barren = 0
    states = task.states if SCENARIOS[result.scenario].ours else task.states // CONTROL_SHARE
    for name in timeline.names(task.seed):
        if len(seen) >= states or barren > BARREN:
            return
        result.tried += 1
        key = timeline.key(timeline.image(timeline.cut(name)))
        barren = 0 if key not in seen else barren + 1
        if not barren:
            seen.add(key)
            yield name


def _chunks(names: Iterator[str] | Sequence[str]) -> Iterator[list[tuple[str, bool]]]:
    """With each name, whether the program itself is to reconcile the state."""
    numbered = ((name, number % EXECUTABLE_EVERY == 0) for number, name in enumerate(names))
    while chunk := list(itertools.islice(numbered, CHUNK)):
        yield chunk


def _until(
    deadline: float, room: threading.Semaphore, chunks: Iterator[list[tuple[str, bool]]]
) -> Iterator[list[tuple[str, bool]]]:
    """As long as there is time, and as soon as there is room."""
    for chunk in chunks:
        room.acquire()
        if time.monotonic() > deadline:
            return
        yield chunk


#: Of a process of the pool; an error is told by its first piece of work, for the pool would begin again for ever.
_JUDGE: list[Judge | Exception] = []


def _begin(folder: str, program: Sequence[str]) -> None:
    try:
        _JUDGE.append(_judge(folder, program))
    except Exception as error:  # noqa: BLE001 - see above
        _JUDGE.append(error)


def _judge(folder: str, program: Sequence[str]) -> Judge:
    die_with_parent()
    prepare_machine()
    launcher = Launcher(program)
    recorded = recording.load(Path(folder))
    judge = Judge(recorded, recorded.timeline(), launcher)
    judge.learn()
    return judge


def _work(chunk: Sequence[tuple[str, bool]]) -> list[Verdict]:
    judge = _JUDGE[0]
    if isinstance(judge, Exception):
        raise judge
    return [_judged(judge, name, executable=executable) for name, executable in chunk]


def _judged(judge: Judge, name: str, *, executable: bool) -> Verdict:
    try:
        return judge.judge(name, executable=executable)
    except Exception as error:  # noqa: BLE001 - one state that cannot be judged is a finding, not the end of the campaign
        return Verdict(name, [f"cannot be judged: {type(error).__name__}: {error}"])


if __name__ == "__main__":
    os.environ["LC_ALL"] = "C"
    sys.exit(main(sys.argv[1:]))
