# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/scale.md, its numbers and its figures: ``make scale``, or ``python -m tests.scale``.

It takes minutes; page and numbers are always the same, and so are the figures with the same matplotlib.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from tests.scale.page import FOLDER, NUMBERS, PAGE, digest, page
from tests.scale.scenarios import MACHINES, SCENARIOS


def say(line: str) -> None:
    """To the person who waits."""
    print(line, flush=True)  # noqa: T201 - a command of its own


def main(arguments: Sequence[str]) -> int:
    """Simulate and write."""
    parser = argparse.ArgumentParser(prog="python -m tests.scale", description=main.__doc__)
    parser.add_argument("--draw", action="store_true", help="only page and figures, of the numbers that are there")
    options = parser.parse_args(arguments)
    if not options.draw:
        FOLDER.mkdir(exist_ok=True)
        NUMBERS.write_text(
            json.dumps(simulated(), indent=None, separators=(",", ":"), sort_keys=False) + "\n", encoding="utf-8"
        )
    numbers = json.loads(NUMBERS.read_text(encoding="utf-8"))
    PAGE.write_text(page(numbers), encoding="utf-8")
    from tests.scale.plots import draw  # noqa: PLC0415 - numbers and page need no matplotlib

    for path in draw(numbers, FOLDER):
        say(f"{path}")
    return 0


def simulated() -> dict[str, Any]:
    """The answers to all questions, and of which code they are."""
    numbers: dict[str, Any] = {"code": digest(), "machines": MACHINES}
    for name, scenario in SCENARIOS.items():
        begun = time.monotonic()
        numbers[name] = scenario(MACHINES)
        say(f"{name}: {time.monotonic() - begun:.0f} s")
    return numbers


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
