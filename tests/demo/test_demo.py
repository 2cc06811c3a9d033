# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo, as ``make demo`` runs it: both of its ways, and that it can fail."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.kernel import die_with_parent

ROOT = Path(__file__).resolve().parents[2]

PROMISES = (
    "the new key opens, the old one does not, the main one still does",
    "right after its first header write",
    "each copy alone: the key that its token names opens",
    "the retired area still holds the old key, and the token's wipe intent names it",
    "reconcile does it; no key is asked for",
    "clean: one pair, generation 3, both header copies alike, no wipe owed",
    "a second reconcile has nothing to do",
)
#: Only where there is a daemon.
OVER_THE_BUS = (
    "a system bus of its own, with real polkitd",
    "refused by polkit, and nothing is changed",
    "busctl rotates the key over D-Bus",
)


def demo(*arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.demo", *arguments]
    environment = {"PATH": path, "PYTHONPATH": str(ROOT)}
    streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, preexec_fn=die_with_parent, **streams)


def kept(shown: str) -> list[str]:
    """The promises that were found to be kept."""
    return [line.removeprefix("ok ") for line in shown.splitlines() if line.startswith("ok ")]


@pytest.mark.parametrize(("arguments", "more"), [((), OVER_THE_BUS), (("--image",), ())], ids=["loop", "image"])
def test_all_promises_are_kept(arguments, more):
    done = demo(*arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    found = kept(done.stdout)
    assert [promise for promise in (*PROMISES, *more) if not any(promise in line for line in found)] == []
    assert re.search(r"^All as promised, in \d+ s; nothing is left behind\.$", done.stdout, re.MULTILINE)
    assert ("On an image file and without the daemon" in done.stdout) == bool(arguments)
    assert "\x1b" not in done.stdout  # no terminal, no colours


def test_a_promise_that_is_broken_ends_it(tmp_path):
    """A cryptsetup that opens with every key."""
    sham = tmp_path / "cryptsetup"
    real = shutil.which("cryptsetup")
    sham.write_text(f'#!/bin/sh\n[ "$1" = open ] && exit 0\nexec {real} "$@"\n', encoding="utf-8")
    sham.chmod(0o755)
    done = demo("--image", path=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED one pair of keyslot and token, generation 1" in done.stdout
    assert "not as promised: what opens is backup-1.key, backup-2.key, backup-3.key, main.key" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
