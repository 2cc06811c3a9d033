# SPDX-License-Identifier: GPL-2.0-or-later
"""luksrotctl."""

import os
import resource
import signal
import sys
from collections.abc import Sequence

from luksrotd.ctl import cli
from luksrotd.ctl.ahead import started
from luksrotd.ctl.exits import Exit
from luksrotd.ctl.interrupt import raise_on_signals
from luksrotd.ctl.render import render
from luksrotd.ctl.report import Report, failed
from luksrotd.errors import Cancelled, Internal, LuksrotdError, Outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run luksrotctl; its exit status.  No exception leaves, but ``SystemExit`` after --help."""
    _open_standard_descriptors()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a passphrase is in here
    raise_on_signals()
    # Who ignores it hands that down, and the kernel would forget processes before they have been asked for.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        report = _report(given)
        return _tell(report, as_json="--json" in given)
    finally:
        _flush()


def _report(arguments: Sequence[str]) -> Report:
    began = False
    try:
        options = cli.parse(arguments)
        began = options.writes
        with started(options):
            report: Report = options.run(options)
        return report
    except LuksrotdError as error:
        return failed(error)
    except BrokenPipeError:  # argparse, printing help; all else that is written or read has its own errors
        return Report(Exit.FAILED, {})
    except KeyboardInterrupt:
        return failed(Cancelled("cannot go on: interrupted"))
    except Exception as error:  # noqa: BLE001 - the boundary: what is left is a bug, and nobody wants a traceback
        outcome = Outcome.UNKNOWN if began else Outcome.UNCHANGED
        return failed(Internal(f"cannot go on: {type(error).__name__}: {error}", outcome=outcome))


def _tell(report: Report, *, as_json: bool) -> int:
    try:
        render(report, as_json=as_json)
    except OSError as error:
        # The device is as the exit status says, whether anybody hears it or not.
        if not isinstance(error, BrokenPipeError):
            _complain(f"luksrotctl: cannot write the result: {error.strerror}")
        if report.read_only and report.status is Exit.DONE:
            return Exit.FAILED
    return report.status


def _complain(message: str) -> None:
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        return  # nobody is left to be told


def _flush() -> None:
    """Leave nothing for the interpreter to write at its end: it would complain, and change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def _open_standard_descriptors() -> None:
    """Where one was closed, a file opened later would get its number, and be written to or read from as such.

    Opened the wrong way round, so that their use still fails.
    """
    for number, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)
            stream = open(number, "r" if number == 0 else "w", closefd=False)  # noqa: SIM115 - for ever
            setattr(sys, ("stdin", "stdout", "stderr")[number], stream)


if __name__ == "__main__":
    sys.exit(main())
