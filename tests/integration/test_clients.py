# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients in other libraries enrol, rotate and watch: GLib, gdbus, jeepney and busctl, judged by real cryptsetup."""

import asyncio
import json
import re
import subprocess

import pytest

from tests.support.daemon_process import BACKUP, ENVIRONMENT, NEW, OLD, WAIT_SECONDS, ended
from tests.support.testbed import PROJECT

pytestmark = pytest.mark.asyncio

DEVICE, JOB = "org.luksrotd1.Device", "org.luksrotd1.Job"
COMPLETED = [True, "committed", "", ""]


async def run(*argv):
    """Standard output of a program that must succeed."""
    words = [str(word) for word in argv]
    done = await asyncio.to_thread(
        subprocess.run, words, cwd=PROJECT, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    assert done.returncode == 0, (words, done.stderr.decode())
    return done.stdout.decode()


@pytest.fixture
def keys(tmp_path):
    for name, secret in (("old", OLD), ("backup", BACKUP), ("new", NEW)):
        (tmp_path / name).write_bytes(secret)
        (tmp_path / name).chmod(0o600)
    return tmp_path


def rotated(volume):
    """The volume after an enrolment and a rotation."""
    assert (volume.opens(OLD), volume.opens(BACKUP), volume.opens(NEW)) == (True, False, True)
    (token,) = volume.metadata()["tokens"].values()
    return token["generation"] == 2


async def in_library(name, volume, keys):
    """What that client prints."""
    program = PROJECT / "tests" / "clients" / f"{name}.py"
    return json.loads(
        await run("/usr/bin/python3", program, volume.path, *(keys / key for key in ("old", "backup", "new")))
    )


async def test_glib(daemon, volume, keys):
    told = await in_library("glib", volume, keys)
    assert rotated(volume)
    assert [result["generation"] for result in told["results"]] == [1, 2]
    assert told["results"][0]["seqid-before"] == told["before"]
    for job in told["jobs"]:
        mine = [event for event in told["seen"] if event[1] == job]
        assert mine[0] == ["added", job]  # as an object of the manager
        assert [event for event in mine if event[0] == "Completed"] == [["Completed", job, *COMPLETED]]
        assert [event[2] for event in mine if event[0] == "State"][-1] == "finished"
        progress = [event[2] for event in mine if event[0] == "Progress"]
        assert progress == sorted(progress)
        assert progress[-1] == 1
    generations = [event[2] for event in told["seen"] if event[:2] == ["Generation", volume.path]]
    assert generations == sorted(set(generations))  # it rose, and each value was told once
    assert [key["generation"] for key in told["keys"]] == [2]
    assert told["failure"] == "org.luksrotd1.Error.UnknownKey"


async def test_jeepney(daemon, volume, keys):
    told = await in_library("plain", volume, keys)
    assert rotated(volume)
    assert volume.path in told["devices"]
    assert told["seen"] == [COMPLETED, COMPLETED]
    assert [result["generation"] for result in told["results"]] == [1, 2]
    assert told["failure"] == "org.freedesktop.DBus.Error.InvalidArgs"


class Watching:
    """A program that prints signals, until it has printed what is waited for."""

    def __init__(self, bed, *argv):
        self._process = bed.spawn(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        self._bed = bed

    async def until(self, text, times=1):
        """What it has printed up to the ``times``-th line with ``text``."""
        lines = []
        async with asyncio.timeout(WAIT_SECONDS):
            while sum(text in line for line in lines) < times:
                line = await asyncio.to_thread(self._process.stdout.readline)
                assert line, lines
                lines.append(line.decode())
        return lines

    def close(self):
        self._bed.end(self._process)


async def test_gdbus(bed, daemon, volume, keys):
    """The command of GLib, which can pass no descriptors: by key files, which belong to root here."""
    target = ("--system", "--dest", "org.luksrotd1", "--object-path", volume.path)
    assert "BeginTransaction" in await run("gdbus", "introspect", *target)
    watching = Watching(bed, "gdbus", "monitor", "--system", "--dest", "org.luksrotd1")
    try:
        await watching.until("The name org.luksrotd1 is owned by")
        cheap = "{'pbkdf': <'pbkdf2'>, 'pbkdf-force-iterations': <uint32 1000>}"
        old = f"{{'keyfile': <'{keys}/old'>}}"
        for method, new in (("Enroll", "backup"), ("Rotate", "new")):
            secret = f"{{'keyfile': <'{keys}/{new}'>}}"
            called = await run("gdbus", "call", *target, "--method", f"{DEVICE}.{method}", "", old, secret, cheap)
            job = re.search(r"'(/org/luksrotd1/job/\d+)'", called)[1]
            lines = await watching.until(f"{job}: {JOB}.Completed (true, 'committed', '', '')")
            assert any("InterfacesAdded" in line and job in line for line in lines)
            assert any(f"{job}: org.freedesktop.DBus.Properties.PropertiesChanged" in line for line in lines)
    finally:
        watching.close()
    assert rotated(volume)


async def test_busctl(bed, daemon, volume, keys):
    watching = Watching(bed, "busctl", "--system", "monitor", "--match", f"type='signal',interface='{JOB}'")
    try:
        await watching.until("Monitoring bus message stream")
        target = ("busctl", "--system", "call", "org.luksrotd1", volume.path, DEVICE)
        cheap = ("2", "pbkdf", "s", "pbkdf2", "pbkdf-force-iterations", "u", "1000")
        for method, new in (("Enroll", "backup"), ("Rotate", "new")):
            secrets = [("1", "keyfile", "s", keys / key) for key in ("old", new)]
            await run(*target, method, "sa{sv}a{sv}a{sv}", "", *secrets[0], *secrets[1], *cheap)
            await watching.until("Member=Completed")
    finally:
        watching.close()
    assert rotated(volume)


async def test_busctl_passes_descriptors_since_systemd_257(daemon, client, volume, keys):
    """What docs/dbus.md says of it: ``h`` and a number that it has inherited; before, it says that it cannot."""
    (version,) = re.findall(r"^systemd (\d+)", await run("busctl", "--version"))
    command = (
        'exec busctl call org.luksrotd1 "$1" org.luksrotd1.Device Enroll "sa{sv}a{sv}a{sv}" "" 1 fd h 3 1 fd h 4 2 '
    )
    command += 'pbkdf s pbkdf2 pbkdf-force-iterations u 1000 3<"$2/old" 4<"$2/new"'
    argv = ("sh", "-c", command, "sh", volume.path, keys)
    if int(version) < 257:
        with pytest.raises(AssertionError, match="file descriptor not supported"):
            await run(*argv)
    else:
        job = re.search(r'"(/org/luksrotd1/job/\d+)"', await run(*argv))[1]
        assert (await ended(client, job))["Outcome"] == "committed"
    assert volume.opens(NEW) == (int(version) >= 257)
