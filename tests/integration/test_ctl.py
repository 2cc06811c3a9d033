# SPDX-License-Identifier: GPL-2.0-or-later
"""luksrotctl and the daemon: the command lines of the README, over the bus."""

import asyncio
import json
import subprocess
import sys

import pytest

from tests.support import makeimage
from tests.support.daemon_process import BACKUP, ENVIRONMENT, NEW, OLD, appeared, settled
from tests.support.testbed import PROJECT

pytestmark = pytest.mark.asyncio
FAST = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")


async def ctl(*words, status=0):
    """Run it; its standard output."""
    argv = [sys.executable, "-m", "luksrotd.ctl", *map(str, words)]
    done = await asyncio.to_thread(
        subprocess.run, argv, cwd=PROJECT, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    assert done.returncode == status, (words, done.returncode, done.stderr.decode())
    assert b"Traceback" not in done.stderr
    return done.stdout


@pytest.fixture
def keys(tmp_path):
    for name, secret in (("old", OLD), ("backup", BACKUP), ("new", NEW), ("wrong", b"wrong")):
        (tmp_path / name).write_bytes(secret)
        (tmp_path / name).chmod(0o600)
    return tmp_path


async def test_a_key_through_its_life(daemon, client, volume, keys):
    unlock = ("--key-file", keys / "old")
    new = ("--new-keyfile", keys / "backup", "--data", '{"escrow": 7}')
    await ctl("enroll", volume.node, *unlock, *new, *FAST)
    await ctl("verify", volume.uuid, "--key-file", keys / "backup")
    await ctl("rotate", volume.node, *unlock, "--generate", "--output", keys / "generated")
    generated = (keys / "generated").read_bytes().strip()
    assert (volume.opens(generated), volume.opens(BACKUP), volume.opens(OLD)) == (True, False, True)
    await ctl("verify", volume.node, "--key-file", keys / "backup", status=1)
    shown = json.loads(await ctl("show", volume.node, "--json"))
    assert "escrow" in json.dumps(shown)
    assert volume.uuid in (await ctl("list", "--json")).decode()
    printed = await ctl("rotate", volume.uuid, *unlock, "--generate", "--output", keys / "second", "--json", *FAST)
    assert volume.pairs()[0][0] == "backup"
    assert json.loads(printed)


async def test_exit_status_tells(enrolled, client, keys):
    new = ("--new-keyfile", keys / "new", *FAST)
    await ctl("rotate", enrolled.node, "--key-file", keys / "wrong", *new, status=1)
    await ctl("rotate", enrolled.node, "--key-file", keys / "old", *new, "--nonsense", status=2)
    await ctl("rotate", enrolled.node, "--key-file", keys / "old", *new, "--name", "no text: \udcff", status=2)
    await ctl("adopt", enrolled.node, "--keyslot", "-1", status=2)
    await ctl("show", "/dev/no-text-\udcff", status=2)
    await ctl("reconcile", enrolled.node)
    await asyncio.to_thread(makeimage.run, "luksKillSlot", "--key-file", "-", enrolled.node, "1", stdin=OLD)
    await settled(client, enrolled.path, Keyslots=[0])
    assert "token-without-keyslot" in (await ctl("reconcile", enrolled.node, "--dry-run", "--json")).decode()
    await ctl("reconcile", "--all", "--json")
    assert enrolled.metadata()["tokens"] == {}
    await appeared(client, enrolled.path)
