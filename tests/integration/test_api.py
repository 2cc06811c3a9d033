# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole path over D-Bus: real bus, polkit, udev, worker and loop device, judged by real cryptsetup."""

import asyncio
import json
import os
import subprocess

import pytest
from dbus_next.signature import Variant

from luksrotd import names
from tests.support import makeimage
from tests.support.busclient import BusClient, CallFailed
from tests.support.daemon_process import (
    BACKUP,
    NEW,
    OLD,
    appeared,
    disk,
    ended,
    memfd,
    reached,
    settled,
    start,
    take_key,
)

pytestmark = pytest.mark.asyncio
DEVICE, JOB = names.DEVICE_INTERFACE, names.JOB_INTERFACE
INVALID = "org.freedesktop.DBus.Error.InvalidArgs"
ERROR = names.ERROR_PREFIX


async def verify(client, path, secret, name="backup"):
    fd = memfd(secret)
    try:
        body = [name, {"fd": Variant("h", 0)}, {}]
        return (await client.call(path, DEVICE, "VerifyKey", "sa{sv}a{sv}", body, fds=[fd]))[0]
    finally:
        os.close(fd)


async def refusal(call):
    with pytest.raises(CallFailed) as caught:
        await call
    return caught.value


async def test_a_key_through_its_life(daemon, client, volume):
    data = {"escrow": "vault/7", "umlaut": "ä"}
    job = await start(client, volume.path, "Enroll", new=BACKUP, data=Variant("s", json.dumps(data)))
    done = await ended(client, job)
    assert (done["State"], done["Outcome"], done["Progress"], done["Stage"]) == ("finished", "committed", 1.0, "done")
    assert {name: value.value for name, value in done["Result"].items()} == {
        "name": "backup", "generation": 1, "keyslot": 1, "seqid-before": 3, "seqid-after": 5,
    }  # fmt: skip
    assert (done["Kind"], done["Devices"], done["KeyName"], done["StartedByUid"]) == (
        "enroll",
        [volume.path],
        "backup",
        0,
    )

    seen = await client.get_all(volume.path, DEVICE)  # at once: who is told that it is done finds it so
    assert (seen["Generation"], seen["Keyslots"], seen["OrdinaryKeyslots"]) == (5, [0, 1], [0])
    assert seen["Tokens"] == [[0, "luksrotd"]]
    assert (seen["Busy"], seen["Problems"], seen["Nodes"]) == (False, [], [volume.node])
    (key,) = seen["Keys"]
    assert (key["name"].value, key["generation"].value, key["keyslot"].value, key["state"].value) == (
        "backup", 1, 1, "active",
    )  # fmt: skip
    assert json.loads((await client.call(volume.path, DEVICE, "GetData", "sa{sv}", ["backup", {}]))[0]) == data
    assert await verify(client, volume.path, BACKUP)
    assert not await verify(client, volume.path, OLD)

    assert (await ended(client, await start(client, volume.path)))["State"] == "finished"
    assert (volume.opens(NEW), volume.opens(BACKUP), volume.opens(OLD, 0)) == (True, False, True)
    assert await verify(client, volume.path, NEW)
    assert json.loads((await client.call(volume.path, DEVICE, "GetData", "sa{sv}", ["", {}]))[0]) == data
    assert await client.call(volume.path, DEVICE, "Reconcile", "a{sv}", [{}]) == [[], []]
    assert volume.pairs() == [("backup", 2)]


async def test_a_generated_key_is_handed_over_before_anything_is_written(enrolled, client):
    before = enrolled.headers()
    job = await start(client, enrolled.path, new=None)
    await reached(client, job, Stage="delivering")
    assert enrolled.headers() == before
    async with BusClient() as other:
        assert (await refusal(other.call(job, JOB, "TakeKey", "a{sv}", [{}]))).name == ERROR + "NotAuthorized"
    key = await take_key(client, job)
    assert (await ended(client, job))["State"] == "finished"
    assert len(key) == 71
    assert (enrolled.opens(key), enrolled.opens(BACKUP), enrolled.opens(OLD)) == (True, False, True)
    assert (await refusal(client.call(job, JOB, "TakeKey", "a{sv}", [{}]))).name == ERROR + "Cancelled"


async def test_a_key_that_was_taken_but_not_confirmed_kills_no_old_one(enrolled, client):
    before = enrolled.headers()
    async with BusClient() as starter:
        job = await start(starter, enrolled.path, new=None)
        await reached(client, job, Stage="delivering")
        assert (await refusal(starter.call(job, JOB, "ConfirmKey", "a{sv}", [{}]))).name == INVALID
        reply = await starter.reply(job, JOB, "TakeKey", "a{sv}", [{}])
        os.close(reply.unix_fds[0])
        assert (await refusal(client.call(job, JOB, "ConfirmKey", "a{sv}", [{}]))).name == ERROR + "NotAuthorized"
    assert (await ended(client, job))["State"] == "cancelled"
    assert enrolled.headers() == before
    assert enrolled.opens(BACKUP)


async def test_errors_say_what_is_true(enrolled, client):
    before = enrolled.metadata()
    for method, arguments, error in (
        ("Rotate", {"old": b"wrong"}, "WrongCredential"),
        ("Rotate", {"name": "other"}, "UnknownKey"),
        ("Enroll", {}, "KeyExists"),
        ("Rotate", {"new": b""}, "SecretRejected"),
    ):
        done = await ended(client, await start(client, enrolled.path, method, **arguments))
        assert (done["State"], done["Outcome"], done["ErrorName"]) == ("failed", "unchanged", ERROR + error)
        assert done["ErrorMessage"].startswith("cannot ")
        assert done["Result"] == {}
    assert enrolled.metadata() == before


async def test_requests_that_are_malformed(enrolled, client, tmp_path):
    fd = memfd(NEW)
    good, new = {"fd": Variant("h", 0)}, {"fd": Variant("h", 1)}
    keyfile = {"keyfile": Variant("s", "relative")}
    for credential, secret, options in (
        ({}, new, {}),
        ({**good, **keyfile}, new, {}),
        ({"passphrase": Variant("s", "x")}, new, {}),
        ({"fd": Variant("s", "x")}, new, {}),
        ({"generate": Variant("b", True)}, new, {}),
        (good, {"generate": Variant("b", False)}, {}),
        (good, {"fd": Variant("h", 0)}, {}),
        (good, {"fd": Variant("h", 7)}, {}),
        (keyfile, new, {}),
        (good, new, {"unknown": Variant("s", "x")}),
        (good, new, {"data": Variant("s", "[1]")}),
        (good, new, {"data": Variant("s", "{")}),
        (good, new, {"data": Variant("s", '{"x": NaN}')}),
        (good, new, {"pbkdf": Variant("s", "md5")}),
        (good, new, {"pbkdf-memory": Variant("u", 1)}),
    ):
        call = client.call(
            enrolled.path, DEVICE, "Rotate", "sa{sv}a{sv}a{sv}", ["", credential, secret, options], fds=[fd, fd]
        )
        assert (await refusal(call)).name == INVALID, (credential, secret, options)
    os.close(fd)
    assert not (await client.get_all(enrolled.path, DEVICE))["Busy"]


async def test_key_files_must_be_roots_alone(enrolled, client, tmp_path):
    good = tmp_path / "good"
    good.write_bytes(OLD)
    good.chmod(0o600)
    (tmp_path / "link").symlink_to(good)
    for name, mode in (("readable", 0o644), ("group", 0o640), ("executable", 0o700)):
        (tmp_path / name).write_bytes(OLD)
        (tmp_path / name).chmod(mode)
    (tmp_path / "foreign").write_bytes(OLD)
    (tmp_path / "foreign").chmod(0o600)
    os.chown(tmp_path / "foreign", 65534, -1)
    (tmp_path / "hard").write_bytes(OLD)
    (tmp_path / "hard").chmod(0o600)
    (tmp_path / "hard2").hardlink_to(tmp_path / "hard")
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "directory").mkdir(0o700)

    async def attempt(path):
        body = ["", {"keyfile": Variant("s", str(path))}, {}]
        return await client.call(enrolled.path, DEVICE, "VerifyKey", "sa{sv}a{sv}", body)

    assert await attempt(good) == [False]
    good.chmod(0o400)
    assert await attempt(good) == [False]
    bad = ("link", "readable", "group", "executable", "foreign", "hard2", "fifo", "directory", "missing")
    for name in bad:
        assert (await refusal(attempt(tmp_path / name))).name == ERROR + "SecretRejected", name
    assert (await refusal(attempt("/dev/null"))).name == ERROR + "SecretRejected"


async def test_busctl_can_do_it_all_with_key_files(daemon, client, volume, tmp_path):
    """busctl before systemd 257 cannot pass descriptors, and exits as soon as it has the job's path."""
    for name, secret in (("old", OLD), ("backup", BACKUP), ("new", NEW)):
        (tmp_path / name).write_bytes(secret)
        (tmp_path / name).chmod(0o600)
    fast = ["pbkdf", "s", "pbkdf2", "pbkdf-force-iterations", "u", "1000"]

    async def busctl(path, interface, member, *arguments):
        argv = ["busctl", "--json=short", "call", names.BUS_NAME, path, interface, member, *arguments]
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["data"] if done.stdout.strip() else []

    manager = (names.ROOT_PATH, names.MANAGER_INTERFACE)
    assert await busctl(*manager, "GetDevices", "a{sv}", "0") == [[volume.path]]
    for named in (volume.uuid, volume.node, f"/dev/../{volume.node}"):
        assert await busctl(*manager, "GetDevice", "sa{sv}", named, "0") == [volume.path]
    secrets = ["1", "keyfile", "s", str(tmp_path / "old"), "1", "keyfile", "s"]
    (job,) = await busctl(
        volume.path, DEVICE, "Enroll", "sa{sv}a{sv}a{sv}", "backup", *secrets, str(tmp_path / "backup"),
        "3", "data", "s", '{"a": 1}', *fast,
    )  # fmt: skip
    assert (await ended(client, job))["State"] == "finished"
    (job,) = await busctl(
        volume.path, DEVICE, "Rotate", "sa{sv}a{sv}a{sv}", "backup", *secrets, str(tmp_path / "new"), "2", *fast
    )
    assert (await ended(client, job))["State"] == "finished"
    credential = ["backup", "1", "keyfile", "s", str(tmp_path / "new"), "0"]
    assert await busctl(volume.path, DEVICE, "VerifyKey", "sa{sv}a{sv}", *credential) == [True]
    assert await busctl(volume.path, DEVICE, "GetData", "sa{sv}", "backup", "0") == ['{"a": 1}']
    assert await busctl(volume.path, DEVICE, "Reconcile", "a{sv}", "0") == [[], []]
    assert (volume.opens(NEW), volume.opens(BACKUP)) == (True, False)


async def test_a_jobs_life_on_the_bus_is_told_once_and_in_order(enrolled, client):
    client.signals.clear()
    job = await start(client, enrolled.path)
    await ended(client, job)
    mine = [message for message in client.signals if message.path == job]
    stages = [
        message.body[1]["Stage"].value
        for message in mine
        if message.member == "PropertiesChanged" and "Stage" in message.body[1]
    ]
    order = ["locking", "reading", "deriving", "verifying", "delivering", "waiting-for-metadata-lock"]
    order += ["new-area", "header-primary"]
    assert stages[:8] == order
    assert stages[-1] == "done"
    assert [message.body for message in mine if message.member == "Completed"] in (
        [[True, "committed", "", ""]],
        [],  # taken out by ended()
    )


# -- who may -----------------------------------------------------------------------------------------------------


async def test_polkit_decides_about_every_method(enrolled, client, nobody, rules):
    job = await start(client, enrolled.path, new=None)
    calls = [
        (names.ROOT_PATH, names.MANAGER_INTERFACE, "GetDevices", "a{sv}", [{}]),
        (names.ROOT_PATH, names.MANAGER_INTERFACE, "GetDevice", "sa{sv}", [enrolled.uuid, {}]),
        (enrolled.path, DEVICE, "Enroll", "sa{sv}a{sv}a{sv}", ["", {}, {}, {}]),
        (enrolled.path, DEVICE, "Rotate", "sa{sv}a{sv}a{sv}", ["", {}, {}, {}]),
        (enrolled.path, DEVICE, "VerifyKey", "sa{sv}a{sv}", ["", {}, {}]),
        (enrolled.path, DEVICE, "GetData", "sa{sv}", ["", {}]),
        (enrolled.path, DEVICE, "Reconcile", "a{sv}", [{}]),
        (job, JOB, "Cancel", "a{sv}", [{}]),
    ]
    rules("NO")
    for call in calls:
        assert (await refusal(nobody.call(*call, interactive=True))).name == ERROR + "NotAuthorized", call
    rules("AUTH_ADMIN")
    for call in calls:
        assert (await refusal(nobody.call(*call))).name.endswith("Error.InteractiveAuthorizationRequired"), call
    rules("YES")
    assert (await refusal(nobody.call(job, JOB, "TakeKey", "a{sv}", [{}]))).name == ERROR + "NotAuthorized"
    assert await nobody.call(*calls[0]) == [[enrolled.path]]
    assert await nobody.call(*calls[5]) == ["{}"]
    assert await nobody.call(*calls[6]) == [[], []]  # with nothing to repair, it waits for nobody
    for call in calls[2:5]:  # authorized, but empty
        assert (await refusal(nobody.call(*call))).name == INVALID
    assert await nobody.call(*calls[7]) == []
    assert (await ended(client, job))["State"] == "cancelled"


async def test_an_agent_may_say_yes(bed, enrolled, nobody, rules):
    rules("AUTH_ADMIN")
    call = (enrolled.path, DEVICE, "GetData", "sa{sv}", ["backup", {}])
    agent = await asyncio.to_thread(bed.agent, "yes", nobody.pid, nobody.uid)
    assert (await refusal(nobody.call(*call))).name.endswith("Error.InteractiveAuthorizationRequired")
    assert await nobody.call(*call, interactive=True) == ["{}"]
    asked = await asyncio.to_thread(agent.wait_for, "begin")
    assert asked["action"] == names.system_action(names.ACTION_GET_DATA)
    assert enrolled.node in asked["message"]
    assert "backup" in asked["message"]
    bed.end(agent.process)


# -- devices -----------------------------------------------------------------------------------------------------


async def test_volumes_come_change_and_go(bed, daemon, client, volume):
    with disk(bed, "second") as second:
        seen = await appeared(client, second.path)
        assert (seen["UUID"], seen["Node"], seen["Keyslots"]) == (second.uuid, second.node, [0])
        await asyncio.to_thread(makeimage.add_key, second.node, OLD, b"somebody's")
        await settled(client, second.path, Keyslots=[0, 1], OrdinaryKeyslots=[0, 1])
        makeimage.import_token(second.node, {"type": "x-foreign", "keyslots": ["1"]}, 5)
        await settled(client, second.path, Tokens=[[5, "x-foreign"]], OrdinaryKeyslots=[0])
        second.detach()
        async with asyncio.timeout(30):
            while (await client.signal("InterfacesRemoved")).body[0] != second.path:
                pass
    assert (await refusal(client.get_all(second.path, DEVICE))).name == "org.freedesktop.DBus.Error.UnknownObject"
    assert (await client.call(names.ROOT_PATH, names.MANAGER_INTERFACE, "GetDevices", "a{sv}", [{}])) == [[volume.path]]


async def test_a_clone_stops_all_writing(bed, daemon, client, volume):
    with disk(bed, "clone", clone_of=volume) as clone:
        seen = await settled(client, volume.path, Nodes=[volume.node, clone.node])
        assert [problem[:2] for problem in seen["Problems"]] == [["uuid-ambiguous", "person"]]
        refused = await refusal(start(client, volume.path, "Enroll"))
        assert refused.name == ERROR + "NeedsPerson"
        assert clone.node in refused.text
    await settled(client, volume.path, Nodes=[volume.node], Problems=[])


async def test_a_killed_slot_is_found_and_its_token_removed_on_request(enrolled, client):
    with_token = enrolled.metadata()
    assert with_token["tokens"]
    await asyncio.to_thread(makeimage.run, "luksKillSlot", "--key-file", "-", enrolled.node, "1", stdin=OLD)
    seen = await settled(client, enrolled.path, Keyslots=[0])
    assert [problem[:2] for problem in seen["Problems"]] == [["token-without-keyslot", "repair"]]
    dry = await client.call(enrolled.path, DEVICE, "Reconcile", "a{sv}", [{"dry-run": Variant("b", True)}])
    assert [finding[0] for finding in dry[0]] == [finding[0] for finding in dry[1]] == ["token-without-keyslot"]
    found, left = await client.call(enrolled.path, DEVICE, "Reconcile", "a{sv}", [{}])
    assert ([finding[0] for finding in found], left) == (["token-without-keyslot"], [])
    assert enrolled.metadata()["tokens"] == {}
    assert (await client.get_all(enrolled.path, DEVICE))["Problems"] == []


async def test_what_is_wrong_when_a_volume_comes_is_mended_at_once(bed, daemon, client):
    def tear(image):
        with image.open("r+b") as file:
            file.seek(16384)
            file.write(bytes(4096))

    with disk(bed, "torn", prepare=tear) as torn:
        await appeared(client, torn.path)
        await settled(client, torn.path, Problems=[])
        assert torn.headers()[16384:16388] == b"SKUL"
