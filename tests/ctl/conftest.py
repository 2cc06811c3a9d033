# SPDX-License-Identifier: GPL-2.0-or-later
"""luksrotctl as its users run it: a process, with its standard streams and maybe a terminal."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.makeimage import KEY, luks_dump_json, make_image

ROOT = Path(__file__).resolve().parents[2]
LUKSROTCTL = (sys.executable, "-P", "-m", "luksrotd.ctl")
CHEAP = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
BACKUP = b"the backup key, generation 1"
NEXT = b"the backup key, generation 2"
_libc = ctypes.CDLL(None)


def environment(**more):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **more}


def die_with_parent():
    _libc.prctl(1, signal.SIGKILL)


def ctl(*arguments, stdin=b"", env=None, prefix=(), **streams):
    """Run luksrotctl to its end."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "input": stdin, **streams}
    command = [*prefix, *LUKSROTCTL, *map(str, arguments)]
    done = subprocess.run(command, env=environment(**(env or {})), check=False, preexec_fn=die_with_parent, **streams)
    assert b"Traceback" not in (done.stdout or b"") + (done.stderr or b""), done.stderr
    return done


def works(*arguments, **streams):
    """The same, and it must succeed; its standard output."""
    done = ctl(*arguments, **streams)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout.decode() if done.stdout else ""


def fails(status, *arguments, **streams):
    """The same, and it must end with ``status``; the JSON document that it prints."""
    done = ctl("--json", *arguments, **streams)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    document = json.loads(done.stdout)
    assert set(document) == {"error", "message", "outcome"}
    assert document["message"].startswith("cannot ")
    return document


def our_tokens(image):
    return [token for token in luks_dump_json(image)["tokens"].values() if token["type"] == "luksrotd"]


@contextmanager
def loop_device(image, sector_size=512, *options):
    command = ["losetup", "--find", "--show", "--sector-size", str(sector_size), *options, str(image)]
    node = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield node
    finally:
        subprocess.run(["losetup", "--detach", node], check=True)


@pytest.fixture
def secret(tmp_path):
    """Makes key files."""

    def write(content):
        path = tmp_path / f"key-{len(list(tmp_path.glob('key-*')))}"
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def image(tmp_path):
    return make_image(tmp_path / "image")


@pytest.fixture
def enrolled(image, secret):
    """An image with the managed key ``BACKUP``."""
    works("--direct", "enroll", image, "--key-file", secret(KEY), "--new-keyfile", secret(BACKUP), *CHEAP)
    return image
