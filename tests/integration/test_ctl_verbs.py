# SPDX-License-Identifier: GPL-2.0-or-later
"""Every verb of luksrotctl through the daemon, judged by the stock tools."""

import asyncio
import json

import pytest

from tests.integration.test_ctl import FAST, ctl
from tests.support import daemon_process, makeimage, tokenplugin
from tests.support.daemon_process import BACKUP, NEW, OLD, appeared, settled

pytestmark = pytest.mark.asyncio


@pytest.fixture
def keys(tmp_path):
    for name, secret in (("old", OLD), ("backup", BACKUP), ("new", NEW)):
        (tmp_path / name).write_bytes(secret)
        (tmp_path / name).chmod(0o600)
    return tmp_path


def tokens(volume):
    """Generation and state of each key."""
    found = volume.metadata()["tokens"].values()
    return {(token["generation"], token["state"]) for token in found if token["type"] == "luksrotd"}


async def told(*words, status=0):
    """Its JSON."""
    return json.loads(await ctl("--json", *words, status=status))


async def test_rotation_in_two_steps(enrolled, keys):
    new = ("--key-file", keys / "old", "--new-keyfile", keys / "new", "--expires", "12h", *FAST)
    staged = await told("stage", enrolled.node, *new)
    assert (staged["generation"], tokens(enrolled)) == (2, {(1, "active"), (2, "staged")})
    shown = await told("show", enrolled.node)
    assert [(key["state"], bool(key["expires_at"])) for key in shown["keys"]] == [("active", False), ("staged", True)]
    status = await told("status", enrolled.node)
    assert (status["state"], status["steps"], status["set"]) == ("staged", ["abort", "finish", "stage"], None)
    await told("finish", enrolled.node, "--generation", "3", status=2)
    await told("abort", enrolled.node)
    assert (tokens(enrolled), enrolled.opens(NEW)) == ({(1, "active")}, False)
    await told("stage", enrolled.node, *new)
    done = await told("confirm", enrolled.node)
    assert (done["generation"], tokens(enrolled)) == (2, {(2, "active")})
    assert (enrolled.opens(BACKUP), enrolled.opens(NEW), enrolled.opens(OLD)) == (False, True, True)


async def test_a_set_of_volumes(bed, client, enrolled, keys):
    with daemon_process.disk(bed, "second") as second:
        await appeared(client, second.path)
        await told("enroll", second.node, "--key-file", keys / "old", "--new-keyfile", keys / "backup", *FAST)
        both = (enrolled.node, second.node)
        new = ("--key-file", keys / "old", "--generate", "--output", keys / "generated")
        staged = await told("stage", *both, *new)
        assert (staged["state"], [one["happened"] for one in staged["volumes"]]) == ("staged", ["staged", "staged"])
        assert [one["generation"] for one in staged["volumes"]] == [2, 2]
        status = await told("status", *both)
        assert (status["set"], status["set_size"], status["state"]) == (staged["set"], 2, "staged")
        assert [one["standing"] for one in status["volumes"]] == ["staged", "staged"]
        await told("finish", enrolled.node, status=3)  # without the others
        await told("finish", *both, "--set", "0123456789abcdef", status=3)
        done = await told("finish", *both, "--set", staged["set"])
        assert done["state"] == "finished"
        generated = (keys / "generated").read_bytes()
        assert [(one.opens(generated), one.opens(BACKUP)) for one in (enrolled, second)] == [(True, False)] * 2
        assert "finished on all of them" in (await ctl("status", *both, "--set", staged["set"])).decode()


async def test_one_volume_without_the_others_of_its_set(bed, client, enrolled, keys):
    with daemon_process.disk(bed, "second") as second:
        await appeared(client, second.path)
        await told("enroll", second.node, "--key-file", keys / "old", "--new-keyfile", keys / "backup", *FAST)
        new = ("--key-file", keys / "old", "--new-keyfile", keys / "new", *FAST)
        await told("stage", enrolled.node, second.node, *new)
    await told("abort", enrolled.node, "--alone")
    assert tokens(enrolled) == {(1, "active")}


async def test_a_set_that_cannot_be_staged_on_one_of_them(bed, client, enrolled, keys):
    with daemon_process.disk(bed, "second") as second:
        await appeared(client, second.path)
        before = enrolled.headers(), second.headers()
        new = ("--key-file", keys / "old", "--generate", "--output", keys / "generated")
        error = await told("stage", enrolled.node, second.node, *new, status=3)  # the second has no such key
        assert (error["error"], error["outcome"]) == ("NeedsPerson", "unchanged")
        assert (enrolled.headers(), second.headers()) == before
        assert not (keys / "generated").exists()


async def test_associated_data_adoption_and_release(enrolled, keys):
    await told("set-data", enrolled.node, "--data", '{"escrow": "vault/7"}')
    assert (await told("show", enrolled.node))["keys"][0]["data"] == {"escrow": "vault/7"}
    await told("adopt", enrolled.node, "--keyslot", "0", "--name", "admin", "--key-file", keys / "backup", status=1)
    adopted = await told("adopt", enrolled.node, "--keyslot", "0", "--name", "admin", "--key-file", keys / "old")
    assert (adopted["keyslot"], sorted(enrolled.pairs())) == (0, [("admin", 0), ("backup", 1)])
    released = await told("release", enrolled.node, "--name", "admin")
    assert (released["keyslot"], enrolled.pairs(), enrolled.opens(OLD)) == (None, [("backup", 1)], True)


async def test_remove_and_scrub(enrolled, keys):
    await told("remove", enrolled.node, "--key-file", keys / "backup", status=1)
    assert enrolled.opens(BACKUP)
    await told("remove", enrolled.node, "--key-file", keys / "old")
    assert (enrolled.pairs(), enrolled.opens(BACKUP), enrolled.opens(OLD)) == ([], False, True)
    before = enrolled.headers()
    assert (await told("scrub", enrolled.node))["bytes"] > 0
    assert (enrolled.headers(), enrolled.opens(OLD)) == (before, True)


async def test_a_key_is_made_anew(client, enrolled, keys):
    await told("release", enrolled.node)
    again = await told("recreate", enrolled.node, "--key-file", keys / "backup", "--data", '{"again": true}')
    assert (again["keyslot"], enrolled.pairs()) == (1, [("backup", 1)])
    new = ("--new-keyfile", keys / "new", *FAST)
    await told("recreate", enrolled.node, "--key-file", keys / "old", *new, status=1)  # nothing of it is lost
    await asyncio.to_thread(makeimage.run, "luksKillSlot", "--key-file", "-", enrolled.node, "1", stdin=OLD)
    await settled(client, enrolled.path, Keyslots=[0])
    await told("recreate", enrolled.node, "--key-file", keys / "old", *new)
    assert (enrolled.opens(NEW), enrolled.opens(BACKUP)) == (True, False)


async def test_only_at_a_sequence_number(enrolled, keys):
    stale = str((await told("show", enrolled.node))["seqid"])
    new = ("--key-file", keys / "old", "--new-keyfile", keys / "new", *FAST)
    done = await told("rotate", enrolled.node, *new, "--if-generation", stale)
    assert str(done["seqid_before"]) == stale
    before = enrolled.headers()
    for words in (
        ("enroll", *new, "--name", "second"),
        ("rotate", *new),
        ("stage", *new),
        ("finish",),
        ("abort", "--alone"),
        ("remove", "--key-file", keys / "old"),
        ("set-data", "--data", "{}"),
        ("adopt", "--keyslot", "0", "--name", "second"),
        ("release",),
        ("scrub",),
    ):
        error = await told(words[0], enrolled.node, *words[1:], "--if-generation", stale, status=6)
        assert (error["error"], error["outcome"]) == ("StaleGeneration", "unchanged"), words
    assert enrolled.headers() == before
    await told("release", enrolled.node, "--if-generation", str(done["seqid_after"]))
    await told("recreate", enrolled.node, "--key-file", keys / "new", "--if-generation", stale, status=6)
    await told("abort", enrolled.node, enrolled.node, "--if-generation", stale, status=2)
    await told("scrub", enrolled.node, "--if-generation", "-1", status=2)


async def test_what_a_reconcile_would_change(client, enrolled):
    await asyncio.to_thread(makeimage.run, "luksKillSlot", "--key-file", "-", enrolled.node, "1", stdin=OLD)
    await settled(client, enrolled.path, Keyslots=[0])
    planned = (await told("reconcile", enrolled.node, "--dry-run"))["volumes"][0]["differences"]
    assert [(one["what"], one["how"]) for one in planned] == [("token", "remove")]
    assert "difference: token 0 removed" in (await ctl("reconcile", enrolled.node, "--dry-run")).decode()
    assert "differences" not in (await told("reconcile", enrolled.node))["volumes"][0]


@pytest.mark.parametrize("direct", [False, True])
async def test_a_token_in_place_of_a_key_file(bed, client, token_plugin, keys, direct):
    way = ["--direct"] if direct else []
    (keys / "pin").write_bytes(b"1234")
    (keys / "bad").write_bytes(b"12345")
    new = ("--new-keyfile", keys / "new", *FAST)

    def prepare(image):
        makeimage.import_token(image, tokenplugin.token(OLD, pin=b"1234"), 0)
        makeimage.import_token(image, tokenplugin.token(b"wrong"), 1)

    with daemon_process.disk(bed, "tokened", prepare=prepare) as volume:
        async with daemon_process.running(bed, client):
            await appeared(client, volume.path)
            pin = ("--pin-file", keys / "pin")
            await told(*way, "enroll", volume.node, "--token", "any", "--pin-file", keys / "bad", *new, status=1)
            await told(*way, "enroll", volume.node, "--token", "any", *pin, *new)
            assert volume.opens(NEW)
            await told(*way, "rotate", volume.node, "--token", "1", *new, status=1)
            assert not (await told(*way, "verify", volume.node, "--token", "0", *pin, status=1))["matches"]
            await told(*way, "stage", volume.node, "--token", "0", *pin, "--new-keyfile", keys / "backup", *FAST)
            await told(*way, "abort", volume.node)
            await told(*way, "remove", volume.node, "--token", "0", *pin)
            assert not volume.opens(NEW)
            for wrong in (("--token", "-2"), ("--token", "x"), ("--token", "0", "-d", keys / "old"), pin):
                await told(*way, "rotate", volume.node, *wrong, *new, status=2)
            await told(*way, "adopt", volume.node, "--keyslot", "0", *pin, status=2)
            await told(*way, "recreate", volume.node, "--token", "0", "--volume-key-file", keys / "old", *new, status=2)


async def test_the_record(enrolled, keys):
    await told("rotate", enrolled.node, "--key-file", keys / "new", "--new-keyfile", keys / "new", *FAST, status=1)
    await told("rotate", enrolled.node, "--key-file", keys / "old", "--new-keyfile", keys / "new", *FAST)
    for device in (enrolled.node, enrolled.uuid):
        records = (await told("history", device, "--since", "1h"))["records"]
        of_key = [one for one in records if one.get("key") == "backup"]
        assert [(one["kind"], one["outcome"], one.get("error", "")) for one in of_key] == [
            ("enroll", "committed", ""),
            ("rotate", "unchanged", "WrongCredential"),
            ("rotate", "committed", ""),
        ]
    text = (await ctl("history", enrolled.node)).decode()
    assert "WrongCredential" in text
    assert enrolled.uuid in text
    assert (await told("history", "--limit", "1"))["records"][0]["uuid"]


async def test_a_daemon_that_dies_in_the_middle(bed, client, volume, keys):
    """Nobody can tell then what the volume holds: that is the exit status, whatever the verb."""
    new = ("--key-file", keys / "old", "--new-keyfile", keys / "backup", *FAST)
    async with daemon_process.running(bed, client, kill=2, when="before"):
        await appeared(client, volume.path)
        error = await told("enroll", volume.node, *new, status=4)
    assert (error["error"], error["outcome"]) == ("Unreachable", "unknown-reconcile-needed")
    assert volume.opens(OLD)
