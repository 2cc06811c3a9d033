# SPDX-License-Identifier: GPL-2.0-or-later
"""All tests but those of installed systems, in two runs of pytest side by side.

The one has those that compute, the other those that wait for real parts.

    python -m tests

The output of the first is shown when the second has ended.  The exit status is that of the one that failed, if one did.
"""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Final

from tests.support.kernel import die_with_parent

TESTS: Final = Path(__file__).parent
#: The decision code, whose coverage is measured, and all that simulates.
COMPUTING: Final = frozenset({"crash", "model", "powercut", "property", "scale", "service", "unit", "vectors"})
#: What boots containers and virtual machines has targets of its own.
ELSEWHERE: Final = frozenset({"installed"})
ARGUMENTS: Final = ("--tb=native", "--hypothesis-profile=ci")


def halves() -> tuple[list[str], list[str]]:
    """The folders and modules of tests: those of ``COMPUTING``, and others, but not those of ``ELSEWHERE``."""
    folders = [path for path in TESTS.iterdir() if any(path.glob("**/test_*.py")) or path.name.startswith("test_")]
    names = sorted(path.relative_to(TESTS.parent).as_posix() for path in folders if path.name not in ELSEWHERE)
    computing = [name for name in names if Path(name).name in COMPUTING]
    return computing, [name for name in names if name not in computing]


def main() -> int:
    """Run them; the exit status of pytest."""
    computing, waiting = halves()
    with tempfile.TemporaryFile() as kept:
        # Not of one process group with this: an interrupt is passed on once, by pytest's own rules.
        first = _start([*computing, "--cov"], kept)
        second = _start([*waiting, "--no-cov"], None)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: [one.send_signal(number) for one in (first, second)])
        statuses = [second.wait(), first.wait()]
        kept.seek(0)
        sys.stdout.flush()
        sys.stdout.buffer.write(kept.read())
        sys.stdout.flush()
    return next((status for status in statuses if status), 0)


def _start(arguments: list[str], output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "pytest", *ARGUMENTS, *arguments]
    return subprocess.Popen(
        argv,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
        preexec_fn=die_with_parent,  # noqa: PLW1509 - there are no threads yet
    )


if __name__ == "__main__":
    sys.exit(main())
