# SPDX-License-Identifier: GPL-2.0-or-later
"""Planted secrets are nowhere: no log, D-Bus message, argv, environment or file (I8)."""

import json
import os
from pathlib import Path

import pytest
from dbus_next.signature import Variant

from luksrotd import names
from tests.bus.monitor import Monitor
from tests.integration.test_jobs import SLOW, until
from tests.support import makeimage, tokenplugin
from tests.support.daemon_process import (
    BACKUP,
    FAST,
    NEW,
    OLD,
    appeared,
    disk,
    ended,
    memfd,
    reached,
    running,
    start,
    take_key,
)

pytestmark = pytest.mark.asyncio
WRONG = b"planted-wrong-secret-1234"
PIN, STORED = b"planted-pin-271828", b"planted-credential-161803"
WITNESS = "planted-witness-in-the-data"
"""Not secret: it must be found, or the search would find nothing at all."""


def processes():
    """Command line and environment of every process that can be looked at, by pid."""
    seen = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                seen[process.name] = (process / "cmdline").read_bytes() + b"\0" + (process / "environ").read_bytes()
            except OSError:
                continue
    return seen


def files(*directories):
    """Content of every regular file below, sparse images of volumes included."""
    for directory in directories:
        for path in directory.rglob("*"):
            if path.is_file() and not path.is_symlink():
                try:
                    yield path, path.read_bytes()
                except OSError:
                    continue


@pytest.fixture
def credentials(tmp_path_factory):
    """A directory of them; not in ``tmp_path``, which is searched."""
    directory = tmp_path_factory.mktemp("credentials")
    (directory / "stored").write_bytes(STORED)
    return {"CREDENTIALS_DIRECTORY": str(directory)}


@pytest.fixture
def volume(bed, token_plugin):
    """One with a token that gives its passphrase, for a PIN; neither is to be read from it in plain."""
    body = tokenplugin.token(OLD, pin=PIN)
    with disk(bed, "tokened", prepare=lambda image: makeimage.import_token(image, body, 0)) as volume:
        yield volume


async def test_no_secret_leaves_a_trace(bed, client, volume, credentials, tmp_path):
    go, there = tmp_path / "go", tmp_path / "there"
    seen, generated = {}, b""
    faults = {"hold": 16, "reached": str(there), "go": str(go)}
    async with Monitor() as monitor, running(bed, client, environment=credentials, **faults) as daemon:
        await appeared(client, volume.path)
        data = {"data": Variant("s", json.dumps({"note": WITNESS}))}
        await ended(client, await start(client, volume.path, "Enroll", new=BACKUP, **data))
        assert (await ended(client, await start(client, volume.path, old=WRONG)))["State"] == "failed"
        # While a key is being derived, both secrets are in the worker.
        job = await start(client, volume.path, **SLOW)
        await reached(client, job, Stage="deriving")
        seen["deriving"] = processes()
        await client.call(job, names.JOB_INTERFACE, "Cancel", "a{sv}", [{}])
        await ended(client, job)
        # While the commit is held in the middle of its writes.
        job = await start(client, volume.path, new=NEW)
        await until(there.exists)
        seen["committing"] = processes()
        in_files = dict(files(bed.dir.parent))
        go.touch()
        assert (await ended(client, job))["State"] == "finished"
        job = await start(client, volume.path, new=None)
        await reached(client, job, Stage="delivering")
        seen["delivering"] = processes()
        generated = await take_key(client, job)
        assert (await ended(client, job))["State"] == "finished"
        seen["asking"] = await rotated_by_token(client, volume)
        assert volume.opens(STORED)
        (kept,) = await client.call(volume.path, names.DEVICE_INTERFACE, "GetData", "sa{sv}", ["", {}])
        assert json.loads(kept) == {"note": WITNESS}
        seen["running"] = {str(daemon.pid): processes()[str(daemon.pid)]}
        log = daemon.log
    assert len(generated) == 71
    check(monitor, daemon, log, seen, in_files | dict(files(bed.dir.parent, tmp_path)), generated)
    assert volume.headers()


def check(monitor, daemon, log, seen, in_files, generated):
    """It is in none of these."""
    secrets = (OLD, BACKUP, NEW, WRONG, generated, PIN, STORED)
    bodies = [repr((message.body, message.error_name, message.member)) for message in monitor.messages]
    named = [name_of(fd) for message in monitor.messages for fd in message.unix_fds]
    for message in monitor.messages:
        for fd in message.unix_fds:
            os.close(fd)
    dump = "\n".join(bodies)
    assert WITNESS in dump, "the monitor sees bodies"
    assert any("test-secret" in name for name in named), "and descriptors"
    for secret in secrets:
        assert secret.decode() not in dump
        assert secret.hex() not in dump
        assert str(list(secret))[1:-1] not in dump

    for stage, found in seen.items():
        assert str(daemon.pid) in found, stage
        for pid, text in found.items():
            assert not [secret for secret in secrets if secret in text], (stage, pid)
    assert any(b"luksrotd.worker" in text for text in seen["deriving"].values()), "the worker was looked at"

    assert "cannot unlock" in log or "WrongCredential" in log or "credential" in log, "failures are logged"
    journals = [text for path, text in in_files.items() if "journal" in str(path) and b"key rotated" in text]
    assert journals, "the journal was looked at"
    for path, text in in_files.items():
        assert not [secret for secret in secrets if secret in text], path
    assert not [secret for secret in secrets if secret.decode() in log]


async def rotated_by_token(client, volume):
    """By a token with its PIN, for a credential of the service; the processes while that was in the worker."""
    job = await rotate_by_token(client, volume, PIN, **SLOW)
    await reached(client, job, Stage="deriving")
    seen = processes()
    await client.call(job, names.JOB_INTERFACE, "Cancel", "a{sv}", [{}])
    assert (await ended(client, job))["State"] == "cancelled"
    for pin, state in ((WRONG, "failed"), (PIN, "finished")):
        assert (await ended(client, await rotate_by_token(client, volume, pin)))["State"] == state
    return seen


async def rotate_by_token(client, volume, pin, **options):
    credential = {"token": Variant("i", -1), "pin-fd": Variant("h", 0)}
    body = ["", credential, {"credential": Variant("s", "stored")}, {**FAST, **options}]
    fd = memfd(pin)
    try:
        (job,) = await client.call(volume.path, names.DEVICE_INTERFACE, "Rotate", "sa{sv}a{sv}a{sv}", body, fds=[fd])
    finally:
        os.close(fd)
    return job


def name_of(fd):
    return str(Path(f"/proc/self/fd/{fd}").readlink())


def proc(daemon, name):
    return Path(f"/proc/{daemon.pid}/{name}").read_text().splitlines()


async def test_the_daemon_cannot_be_dumped(daemon):
    core = next(line for line in proc(daemon, "limits") if line.startswith("Max core file size"))
    assert core.split()[4:6] == ["0", "0"]
    assert next(line for line in proc(daemon, "status") if line.startswith("Umask")).split()[1] == "0077"


async def test_a_secret_in_the_wrong_place_is_not_repeated(enrolled, client, daemon):
    """Whatever a confused client puts where, the daemon does not echo it."""
    planted = "planted-in-the-wrong-place"
    for body in (
        ["", {"passphrase": Variant("s", planted)}, {"fd": Variant("s", planted)}, {}],
        ["", {"keyfile": Variant("s", planted)}, {"generate": Variant("b", True)}, {}],
        ["", {"keyfile": Variant("s", f"/nowhere/{planted}")}, {"generate": Variant("b", True)}, {}],
        ["", {"generate": Variant("s", planted)}, {}, {"data": Variant("s", planted)}],
    ):
        reply = await client.reply(enrolled.path, names.DEVICE_INTERFACE, "Rotate", "sa{sv}a{sv}a{sv}", body)
        assert reply.error_name
        assert planted not in repr(reply.body)
    assert planted not in daemon.log
