# SPDX-License-Identifier: GPL-2.0-or-later
"""rotate --older-than and --escrow over the bus: as unattended rotation uses them."""

import asyncio
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from luksrotd.rotation.token import utc
from tests.bus.monitor import Monitor
from tests.integration.test_ctl import FAST, ctl
from tests.integration.test_secrets import files, processes
from tests.support import makeimage
from tests.support.daemon_process import BACKUP, ENVIRONMENT, OLD, appeared, disk
from tests.support.escrow import DATA, KEY, Escrow
from tests.support.testbed import PROJECT

pytestmark = pytest.mark.asyncio


@pytest.fixture
def escrow(tmp_path):
    return Escrow(tmp_path / "escrow")


@pytest.fixture
def rotate(tmp_path, escrow):
    """All but the device."""
    (tmp_path / "old").write_bytes(OLD)
    (tmp_path / "old").chmod(0o600)
    return ("rotate", "--key-file", tmp_path / "old", "--generate", "--escrow", escrow.path)


async def told(*words, status=0):
    """Its JSON."""
    return json.loads(await ctl("--json", *words, status=status))


async def test_what_is_due_is_rotated_once(bed, client, daemon, rotate, escrow):
    def prepare(image):
        makeimage.add_key(image, OLD, BACKUP)
        token = {"type": "luksrotd", "keyslots": ["1"], "name": "backup", "generation": 4, "data": {}}
        makeimage.import_token(image, {**token, "rotated_at": utc(datetime.now(UTC) - timedelta(days=91))}, 0)

    with disk(bed, "aged", prepare=prepare) as volume:
        await appeared(client, volume.path)
        assert (await told(*rotate, volume.node, "--older-than", "14w"))["outcome"] == "unchanged"
        assert not escrow.was_run
        done = await told(*rotate, volume.uuid, "--older-than", "90d")
        assert (done["generation"], done["outcome"]) == (5, "committed")
        assert (volume.opens(escrow.key), volume.opens(BACKUP), volume.opens(OLD)) == (True, False, True)
        [token] = volume.metadata()["tokens"].values()
        assert token["data"] == DATA
        assert escrow.facts == {
            "VERB": "rotate", "UUID": volume.uuid, "DEVICE": volume.node, "NAME": "backup", "GENERATION": "5",
        }  # fmt: skip
        before = volume.headers()
        left = await told(*rotate, volume.node, "--older-than", "90d")
        assert (left["generation"], left["outcome"]) == (5, "unchanged")
        assert volume.headers() == before


async def test_enrolment_and_stage(client, daemon, volume, rotate, escrow):
    (_, *new) = rotate
    assert (await told("enroll", volume.node, *new))["generation"] == 1
    first = escrow.key
    assert (await told("stage", volume.node, *new))["generation"] == 2
    assert escrow.facts["GENERATION"] == "2"
    assert (volume.opens(first), volume.opens(escrow.key)) == (True, True)
    await told("finish", volume.node)
    assert (volume.opens(first), volume.opens(escrow.key)) == (False, True)


@pytest.mark.parametrize("script", ["exit 1", "echo nonsense", "exec cat /dev/zero", "exec sleep infinity"])
async def test_an_escrow_that_fails_leaves_the_volume(enrolled, rotate, escrow, script):
    before = enrolled.headers()
    escrow.does(script)
    error = await told(*rotate, enrolled.node, "--escrow-timeout", "2", status=1)
    assert (error["error"], error["outcome"]) == ("SecretRejected", "unchanged")
    assert enrolled.headers() == before
    assert not enrolled.opens(escrow.key)


async def test_a_refusal_comes_before_the_escrow(enrolled, rotate, escrow):
    (_, *new) = rotate
    assert (await told("enroll", enrolled.node, *new, status=1))["error"] == "KeyExists"
    assert (await told("rotate", enrolled.node, *new, "--name", "no", status=1))["error"] == "UnknownKey"
    stale = ("--if-generation", "1")
    assert (await told("rotate", enrolled.node, *new, *stale, status=6))["error"] == "StaleGeneration"
    assert not escrow.was_run


async def test_somebody_who_comes_in_between(enrolled, rotate, escrow):
    argv = f"{sys.executable} -P -m luksrotd.ctl set-data {enrolled.node} --data '{{}}'"
    escrow.does(f"PYTHONPATH={PROJECT} {argv} >&2")
    error = await told(*rotate, enrolled.node, status=6)
    assert (error["error"], error["outcome"]) == ("StaleGeneration", "unchanged")
    assert (enrolled.opens(BACKUP), enrolled.opens(escrow.key)) == (True, False)


async def test_the_key_leaves_no_trace(bed, daemon, enrolled, rotate, escrow, tmp_path):
    """It goes to the daemon by a descriptor; nobody else sees it, but the escrow."""
    for name in ("there", "go"):
        os.mkfifo(tmp_path / name)
    escrow.does(f'echo >"{tmp_path}/there"; read line <"{tmp_path}/go"; printf \'{json.dumps(DATA)}\'')
    argv = [sys.executable, "-m", "luksrotd.ctl", *map(str, rotate), enrolled.node, *FAST]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    async with Monitor() as monitor:
        process = bed.spawn(argv, cwd=PROJECT, env=ENVIRONMENT, stdin=subprocess.DEVNULL, **pipes)
        await asyncio.to_thread((tmp_path / "there").read_text)
        seen = processes()
        (tmp_path / "go").write_text("\n")
        output = (await asyncio.to_thread(process.communicate))[0]
        assert process.returncode == 0, output
    key = escrow.key
    assert KEY.fullmatch(key)
    assert enrolled.opens(key)
    rotations = [message for message in monitor.messages if message.member == "Rotate"]
    assert rotations
    assert all(message.unix_fds for message in rotations), "by descriptors"
    for message in monitor.messages:
        for fd in message.unix_fds:
            os.close(fd)
        assert key.decode() not in repr(message.body)
    assert str(process.pid) in seen
    assert key not in output
    assert key.decode() not in daemon.log
    assert not [pid for pid, text in seen.items() if key in text]
    kept = escrow.path.with_suffix(".key")
    found = dict(files(bed.dir.parent, tmp_path))
    assert kept in found
    assert [path for path, text in found.items() if key in text] == [kept]
