# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/dbus.md: its shell blocks are run as they stand, in one shell, by the real busctl."""

import asyncio
import os
import re
import subprocess

import pytest

from tests.support.daemon_process import BACKUP, NEW, OLD, WAIT_SECONDS
from tests.support.testbed import PROJECT

PAGE = PROJECT / "docs" / "dbus.md"


def blocks(language):
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"))


@pytest.mark.asyncio
async def test_the_commands_do_what_they_say(daemon, client, volume, tmp_path):
    secrets = {"passphrase": OLD, "first": b"first key", "second": NEW, "third": b"third key"}
    for name, secret in secrets.items():
        (tmp_path / name).write_bytes(secret)
        (tmp_path / name).chmod(0o600)
    script = "set -e\ntrap 'kill $monitor' EXIT\nmonitor=\n" + "".join(blocks("sh"))
    # The last thing that is said is how often the monitor saw a job end; it may miss the first.
    script = script.replace("kill $monitor\n", "kill $monitor\ntrap - EXIT\n")
    environment = {**os.environ, "device": volume.node, "keys": str(tmp_path)}
    done = await asyncio.to_thread(
        subprocess.run,
        ["sh", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=4 * WAIT_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr in ("", "Monitoring bus message stream.\n")
    assert done.stdout.count('s "finished"') == 2
    assert int(done.stdout.splitlines()[-1]) >= 1
    assert volume.pairs() == [("backup", 2)]
    opens = {name: volume.opens(secret) for name, secret in secrets.items()}
    assert opens == {"passphrase": True, "first": False, "second": True, "third": False}
    assert '"data" : "stage"' in done.stdout


@pytest.mark.asyncio
async def test_the_programs_do_what_they_say(daemon, enrolled, tmp_path):
    glib, jeepney = blocks("python")
    assert "gi.repository" in glib
    for name, content in (("old", OLD), ("new", NEW), ("glib", glib.encode()), ("jeepney", jeepney.encode())):
        (tmp_path / name).write_bytes(content)
    told = await run("/usr/bin/python3", tmp_path / "glib", enrolled.path, tmp_path / "old")
    assert "'success': True" in told
    assert (enrolled.opens(BACKUP), enrolled.pairs()) == (False, [("backup", 2)])  # a key that only it has seen
    told = await run("/usr/bin/python3", tmp_path / "jeepney", enrolled.path, tmp_path / "old", tmp_path / "new")
    assert "(True, 'committed', '', '')" in told
    (example,) = (one for one in enrolled.metadata()["tokens"].values() if one["type"] == "example")
    assert enrolled.opens(NEW, int(example["keyslots"][0]))


async def run(*argv):
    """Standard output of what must succeed; the system's Python, for it has Debian's libraries."""
    words = [str(word) for word in argv]
    done = await asyncio.to_thread(
        subprocess.run, words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
