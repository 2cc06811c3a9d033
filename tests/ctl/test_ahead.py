# SPDX-License-Identifier: GPL-2.0-or-later
"""The worker that --direct starts before it does anything else."""

import subprocess
import sys
from pathlib import Path

import pytest

from luksrotd.ctl import ahead
from tests.ctl.conftest import BACKUP, CHEAP, KEY, NEXT, environment
from tests.ctl.test_interface import VERBS

#: luksrotctl, telling of each process that it starts whether asyncio was there by then.
WATCHED = """
import os, sys
def told(event, arguments):
    if event == "subprocess.Popen":
        print("started", *arguments[1], "asyncio" in sys.modules, file=sys.stderr)
sys.addaudithook(told)
print("luksrotctl", os.getpid(), file=sys.stderr)
from luksrotd.ctl.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def workers(status, *arguments):
    """Run luksrotctl --direct; whether asyncio was there when it started each of its workers, none of which is left."""
    command = [sys.executable, "-P", "-c", WATCHED, "--direct", *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    (parent,) = (line.split()[1] for line in done.stderr.splitlines() if line.startswith("luksrotctl "))
    started = [line.split() for line in done.stderr.splitlines() if line.startswith("started ")]
    begun = [words for words in started if "luksrotd.worker" in words]
    assert all(words[-2] == parent for words in begun)
    assert not [words for words in running() if "luksrotd.worker" in words and parent in words]
    return [words[-1] == "True" for words in begun]


def running():
    for process in Path("/proc").glob("[0-9]*"):
        try:
            yield (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended meanwhile
            continue


def test_it_is_known_by_verbs_that_there_are():
    assert set(VERBS) >= ahead.VERBS


@pytest.mark.parametrize("verb", ["rotate", "stage"])
def test_a_change_has_one_worker_that_was_started_before_asyncio_came(enrolled, secret, verb):
    arguments = ("-d", secret(KEY), "--new-keyfile", secret(NEXT), *CHEAP)
    assert workers(0, verb, enrolled, *arguments) == [False]


def test_so_has_a_question(enrolled, secret):
    assert workers(0, "verify", enrolled, "-d", secret(BACKUP)) == [False]


def test_one_that_finds_no_work_is_ended(enrolled, secret, tmp_path):
    assert workers(1, "rotate", enrolled, "-d", tmp_path / "missing", "--new-keyfile", secret(NEXT)) == [False]
    assert workers(1, "verify", tmp_path / "missing", "-d", secret(BACKUP)) == [False]


def test_none_is_started_for_what_needs_none(enrolled, secret):
    arguments = ("-d", secret(KEY), "--new-keyfile", secret(NEXT))
    assert workers(0, "show", enrolled) == []
    assert workers(0, "reconcile", enrolled, "--dry-run") == []
    assert workers(2, "rotate", enrolled, *arguments, "--output", "x") == []
    # These need another kind of worker, which is started when it is known what for.
    assert workers(0, "rotate", enrolled, *arguments, *CHEAP, "--engine", "stepwise") == []
    assert workers(1, "rotate", enrolled, "--token", "any", "--new-keyfile", secret(NEXT)) == [True]
