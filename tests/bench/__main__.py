# SPDX-License-Identifier: GPL-2.0-or-later
"""``make bench``: measures, and writes docs/benchmarks; or ``python -m tests.bench [--only N...] [--rounds N]``.

Each measurement runs in a process of its own, for what one leaves in memory is not to slow the next one.
"""

import argparse
import asyncio
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.bench import bus, commit, counted, crash, idle, lock, reconcile, rotation, throughput, udevtime
from tests.bench.figures import Result, shown
from tests.bench.page import page, plot_of
from tests.bench.remarks import REMARKS
from tests.bench.stage import BENCH, run
from tests.support.testbed import PROJECT

DOCS: Final = PROJECT / "docs" / "benchmarks"
NUMBERS: Final = DOCS / "results.json"
#: By number: what measures, and its rounds.
MEASURES: Final[Mapping[int, tuple[Callable[[int], Awaitable[Result]], int]]] = {
    1: (rotation.cheap, 60),
    2: (rotation.costly, 10),
    3: (rotation.cold, 40),
    4: (counted.counted, 3),
    5: (lock.held, 30),
    6: (commit.alone, 200),
    7: (reconcile.clean, 5),
    8: (throughput.concurrent, 5),
    9: (bus.properties, 2000),
    10: (idle.quiet, 5),
    11: (udevtime.events, 100),
    12: (crash.judged, 3),
}


def main(arguments: Sequence[str]) -> int:
    """Measure; 1 if a measurement fails, whatever the figures are."""
    options = _options(arguments)
    if options.here:
        (number,) = options.only
        _measure(number, options.rounds)
        return 0
    failed = [number for number in options.only if not _apart(number, options.rounds)]
    for number in failed:
        _say(f"{number} could not be measured")
    if not failed and options.rounds is None:
        _publish(options.only)
    return 1 if failed else 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure, beside other tools.")
    parser.add_argument("--only", type=int, nargs="+", choices=list(MEASURES), default=list(MEASURES), metavar="N")
    parser.add_argument("--rounds", type=int, help="of each measurement, instead of its own number")
    parser.add_argument("--here", action="store_true", help="in this process, and no page")
    return parser.parse_args(arguments)


def _apart(number: int, rounds: int | None) -> bool:
    """The inventories of its volumes, which are nobody's afterwards, are not left on the machine."""
    command = [sys.executable, "-m", "tests.bench", "--here", "--only", str(number)]
    command += ["--rounds", str(rounds)] if rounds else []
    BENCH.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="state-", dir=BENCH) as state:
        environment = {**os.environ, "STATE_DIRECTORY": state}
        return not subprocess.run(command, cwd=PROJECT, check=False, env=environment).returncode


def _measure(number: int, rounds: int | None) -> None:
    result = asyncio.run(_run(number, rounds or MEASURES[number][1]))
    if rounds is None:
        saved(number).parent.mkdir(parents=True, exist_ok=True)
        found = {"measured": _now(), "result": result.to_json()}
        saved(number).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    _say(f"{number}. {result.title}")
    for one in [*result.series, *result.ratios]:
        figures = (shown(value, one.unit) for value in (one.minimum, one.median, one.maximum))
        _say(f"    {one.name}: {', '.join(figures)}")
    for finding in result.findings:
        _say(f"    {finding}")


def _publish(numbers: Sequence[int]) -> None:
    """Write docs/benchmarks: of what was measured now, and of the others what stands there."""
    from tests.bench.plots import draw  # noqa: PLC0415 - only here is matplotlib needed

    there = json.loads(NUMBERS.read_text(encoding="utf-8"))["results"] if NUMBERS.exists() else []
    now = [json.loads(saved(number).read_text(encoding="utf-8")) for number in numbers]
    by_number = {one["result"]["number"]: one for one in [*there, *now]}
    found = [by_number[number] for number in sorted(by_number)]
    results = [Result.from_json(one["result"]) for one in found]
    measured = {result.number: one["measured"] for result, one in zip(results, found, strict=True)}
    DOCS.mkdir(exist_ok=True)
    plots = {result.number for result in results if draw(result, DOCS / plot_of(result.number))}
    machine = _machine()
    everything = {"machine": machine, "results": found}
    NUMBERS.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    (DOCS / "README.md").write_text(page(results, machine, measured, plots, REMARKS), encoding="utf-8")


def _now() -> str:
    """When, and of what."""
    commit = run(("git", "rev-parse", "--short", "HEAD")).decode().strip()
    changed = run(("git", "status", "--porcelain", "--", "luksrotd", "tests")).decode().strip()
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"{day}, at {commit}" + (" and changes" if changed else "")


def _machine() -> dict[str, str]:
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith("model name")), "?")
    return {
        "processor": f"{model}, {os.cpu_count()} of them",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "cryptsetup": run(("cryptsetup", "--version")).decode().strip(),
        "systemd": run(("systemctl", "--version")).decode().splitlines()[0],
    }


async def _run(number: int, rounds: int) -> Result:
    return await MEASURES[number][0](rounds)


def saved(number: int) -> Path:
    """Where a result waits for the page."""
    return BENCH / "results" / f"{number:02}.json"


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a command of its own


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
