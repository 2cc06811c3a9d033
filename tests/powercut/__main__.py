# SPDX-License-Identifier: GPL-2.0-or-later
"""The campaign of power cuts, and docs/power-cuts.md from it: ``make powercut``, or ``python -m tests.powercut``."""

import argparse
import datetime
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tests.beds import roots
from tests.powercut.enter import judge
from tests.powercut.inside import Result, Task
from tests.powercut.page import page, wrong
from tests.powercut.record import FOLDER, TOP, folder_of, record
from tests.powercut.scenarios import SCENARIOS

PAGE: Final = TOP / "docs" / "power-cuts.md"
RESULTS: Final = FOLDER / "results.json"
#: What a whole campaign has judged so far: it can be ended, and go on later with the next recording.
JUDGED: Final = FOLDER / "judged.json"
FAILED: Final = FOLDER / "failed"
#: What engineers of the machines have counted: a list of rows, if it is there.
KILLS: Final = FOLDER / "vm-kill.json"
PROGRAM: Final = ("/usr/bin/luksrotctl",)
#: Distinct states of each recording, so that all recordings of ours together make more than 20,000.
STATES: Final = 1300
#: The part that CI does.
SAMPLE: Final = ("rotation",)
SAMPLE_STATES: Final = 60


def say(line: str) -> None:
    """To the person who waits."""
    print(line, flush=True)  # noqa: T201 - a command of its own


def main(arguments: Sequence[str]) -> int:
    """Record what is not recorded, judge, and tell; 1 if there is anything wrong."""
    options = _options(arguments)
    releases = [options.release] if options.release else list(roots.RELEASES)
    names = [options.scenario] if options.scenario else list(SCENARIOS)
    states = options.states
    if options.sample:
        releases, names, states = releases[:1], list(SAMPLE), SAMPLE_STATES
    whole = not (options.sample or options.state or options.release or options.scenario or options.record == "only")
    judged = 0.0
    results = _judged(options) if whole else []
    for number, release in enumerate(releases):
        folders = [_recorded(release, name, options.record) for name in names]
        if options.record == "only":
            continue
        judging = time.monotonic()
        seconds = (options.minutes * 60 - judged) / (len(releases) - number)
        known, only = {result.folder for result in results}, [options.state] if options.state else []
        paths = [path for path in map(str, filter(None, folders)) if path not in known]
        task = Task(paths, options.seed, states, max(seconds, 1.0), options.processes, PROGRAM, only)
        for result in judge(roots.installed(release), task):
            say(_line(result))
            _keep(result)
            results.append(result)
            if whole:
                _save(options, results)
        judged += time.monotonic() - judging
    found = wrong(results) if not options.state else [f"{name}: {what}" for r in results for name, what in r.violations]
    if whole:
        _publish(results, _meta(arguments, options, sum(result.seconds for result in results) / 60), options.output)
    for what in found:
        say(what)
    return 1 if found else 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.powercut", description=main.__doc__)
    parser.add_argument("--release", choices=roots.RELEASES, help="this one only")
    parser.add_argument("--scenario", choices=list(SCENARIOS), metavar="NAME", help="this one only")
    parser.add_argument("--state", metavar="NAME", help="judge this state only, of a recording that is there")
    parser.add_argument("--seed", type=int, default=2026, help="of the states that are made at random")
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="for judging, all recordings together")
    parser.add_argument("--states", type=int, default=STATES, help="distinct ones, of each recording")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--record", choices=("missing", "always", "only"), default="missing")
    parser.add_argument("--sample", action="store_true", help="a short one, for CI")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page that a whole campaign writes")
    return parser.parse_args(arguments)


def _recorded(release: str, name: str, when: str) -> Path | None:
    """The folder with a recording, made if need be; ``None`` where the scenario has no tools."""
    folder = folder_of(release, name)
    if when == "always" or not (folder / "facts.json").exists():
        begun = time.monotonic()
        made = record(release, name)
        if made is None:
            say(f"{release}, {name}: not recorded, its tools are not there")
            return None
        shutil.rmtree(folder, ignore_errors=True)
        made.save(folder)
        say(f"{release}, {name}: recorded in {time.monotonic() - begun:.0f} s")
    return folder


def _judged(options: argparse.Namespace) -> list[Result]:
    """What a campaign that was ended has found of the recordings that are there, if it looked at the same states."""
    if options.record == "always" or not JUDGED.exists():
        return []
    saved = json.loads(JUDGED.read_text(encoding="utf-8"))
    if saved["states"] != _states(options):
        return []
    found = [Result(**result) for result in saved["results"]]
    since = JUDGED.stat().st_mtime
    return [one for one in found if (Path(one.folder) / "facts.json").stat().st_mtime < since]


def _save(options: argparse.Namespace, results: Sequence[Result]) -> None:
    saved = {"states": _states(options), "results": [asdict(result) for result in results]}
    draft = JUDGED.with_suffix(".new")
    draft.write_text(json.dumps(saved), encoding="utf-8")
    draft.rename(JUDGED)


def _states(options: argparse.Namespace) -> list[Any]:
    """What says which states are looked at."""
    return [options.seed, options.states, options.minutes]


def _keep(result: Result) -> None:
    """What failed, with its recording, so that it can be judged again."""
    if not result.violations or not wrong([result]):
        return
    folder = FAILED / result.release / Path(result.folder).name
    shutil.copytree(result.folder, folder, dirs_exist_ok=True)
    (folder / "violations.json").write_text(json.dumps(asdict(result), indent=2), encoding="utf-8")
    say(f"kept in {folder}")


def _publish(results: Sequence[Result], meta: dict[str, Any], output: Path) -> None:
    RESULTS.write_text(json.dumps({"meta": meta, "results": [asdict(r) for r in results]}), encoding="utf-8")
    kills = json.loads(KILLS.read_text(encoding="utf-8")) if KILLS.exists() else []
    output.write_text(page(results, meta, kills), encoding="utf-8")


def _meta(arguments: Sequence[str], options: argparse.Namespace, minutes: float) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "-m", "tests.powercut", *arguments]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seed": options.seed,
        "minutes": minutes,
        "processors": options.processes,
    }


def _line(r: Result) -> str:
    trouble = f", {r.wrong} WITH VIOLATIONS: {r.violations[0]}" if r.wrong else ""
    return (
        f"{r.release}, {r.scenario}: {r.distinct} states of {r.tried} names, {r.repaired} repaired{trouble} "
        f"({r.seconds:.0f} s, {r.distinct / max(r.seconds, 0.001):.1f} a second)"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
