# SPDX-License-Identifier: GPL-2.0-or-later
"""Every verb of a volume over D-Bus, judged by real cryptsetup."""

import json
import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from dbus_next.signature import Variant

from luksrotd import names
from luksrotd.luks2.pair import parse_pair
from luksrotd.rotation.view import view
from tests.support import makeimage
from tests.support.busclient import CallFailed
from tests.support.daemon_process import BACKUP, FAST, NEW, OLD, appeared, disk, ended, memfd, running, settled, start

pytestmark = pytest.mark.asyncio
DEVICE, MANAGER = names.DEVICE_INTERFACE, names.MANAGER_INTERFACE
ERROR = names.ERROR_PREFIX
INVALID = "org.freedesktop.DBus.Error.InvalidArgs"
KEY = "sa{sv}a{sv}a{sv}"


async def job(client, volume, method, signature, body, *secrets):
    """Call, wait for the job's end; its properties.  A secret is described by ``fd(n)``."""
    fds = [memfd(secret) for secret in secrets]
    try:
        (path,) = await client.call(volume.path, DEVICE, method, signature, body, fds=fds)
    finally:
        for descriptor in fds:
            os.close(descriptor)
    return await ended(client, path)


async def done(*arguments):
    """The same for one that succeeds; its result."""
    found = await job(*arguments)
    assert (found["State"], found["Outcome"]) == ("finished", "committed"), found
    return {name: value.value for name, value in found["Result"].items()}


async def refused(*arguments):
    """The same for one that fails, and changes nothing; the error's name."""
    volume = arguments[1]
    before = volume.headers()
    found = await job(*arguments)
    assert (found["State"], found["Outcome"]) == ("failed", "unchanged"), found
    assert volume.headers() == before
    return found["ErrorName"]


def fd(number):
    return {"fd": Variant("h", number)}


def only_at(generation):
    return {"if-generation": Variant("t", generation)}


async def keys(client, volume):
    """The property Keys, as a list of plain dictionaries, by generation."""
    found = await client.get(volume.path, DEVICE, "Keys")
    plain = [{name: value.value for name, value in key.items()} for key in found]
    return sorted(plain, key=lambda key: key["generation"])


async def plan(client, volume, verb, name="", **options):
    """The dry run: the generation, and (what, how) of each difference."""
    before = volume.headers()
    generation, differences = await client.call(volume.path, DEVICE, "Plan", "ssa{sv}", [verb, name, options])
    assert volume.headers() == before
    return generation, [(what, how) for what, _, how, _, _ in differences]


def content(volume):
    return Path(volume.node).read_bytes()


def overwrite(volume, offset, data):
    with Path(volume.node).open("r+b") as node:
        os.pwrite(node.fileno(), data, offset)
        os.fsync(node.fileno())


def forget(volume):
    """Let the staged key have expired, years ago."""
    tokens = volume.metadata()["tokens"].items()
    number, token = next((number, token) for number, token in tokens if token["state"] == "staged")
    makeimage.run("token", "remove", "--token-id", number, volume.node)
    makeimage.import_token(volume.node, {**token, "expires_at": "2020-01-01T00:00:00Z"}, int(number))


async def test_a_rotation_in_two_steps(enrolled, client):
    stage = [KEY, ["", fd(0), fd(1), {**FAST, "expires": Variant("t", 3600)}], OLD, NEW]
    generation, differences = await plan(client, enrolled, "stage")
    assert differences == [("keyslot", "add"), ("token", "add")]
    assert generation == await client.get(enrolled.path, DEVICE, "Generation")
    stage[1][3].update(only_at(generation))
    result = await done(client, enrolled, "Stage", *stage)
    assert (result["generation"], result["seqid-before"]) == (2, generation)
    assert (enrolled.opens(BACKUP), enrolled.opens(NEW)) == (True, True)
    active, staged = await keys(client, enrolled)
    assert (active["state"], active["expires-at"], staged["state"], staged["group"]) == ("active", "", "staged", "")
    assert staged["expires-at"] > staged["rotated-at"]
    assert (staged["group-size"], staged["adopted"]) == (0, False)

    assert await refused(client, enrolled, "Abort", "sa{sv}", ["", only_at(generation)]) == ERROR + "StaleGeneration"
    wrong = {"key-generation": Variant("u", 1)}
    assert await refused(client, enrolled, "Abort", "sa{sv}", ["", wrong]) == INVALID
    assert await plan(client, enrolled, "abort") == (
        await client.get(enrolled.path, DEVICE, "Generation"),
        [("keyslot", "remove"), ("token", "remove"), ("area", "wipe")],
    )
    assert (await done(client, enrolled, "Abort", "sa{sv}", ["", {}]))["generation"] == 1
    assert (enrolled.opens(BACKUP), enrolled.opens(NEW)) == (True, False)

    stage[1][3] = FAST
    await done(client, enrolled, "Stage", *stage)
    right = {"key-generation": Variant("u", 2)}
    assert (await done(client, enrolled, "Finish", "sa{sv}", ["backup", right]))["generation"] == 2
    assert (enrolled.opens(BACKUP), enrolled.opens(NEW), enrolled.opens(OLD)) == (False, True, True)
    assert enrolled.pairs() == [("backup", 2)]


async def test_data_is_set_and_the_key_removed(enrolled, client):
    generation, differences = await plan(client, enrolled, "set-data", data=Variant("s", '{"a": 1}'))
    assert differences == [("token", "change")]
    await done(client, enrolled, "SetData", "ssa{sv}", ["", '{"a": "ä"}', only_at(generation)])
    (text,) = await client.call(enrolled.path, DEVICE, "GetData", "sa{sv}", ["", {}])
    assert json.loads(text) == {"a": "ä"}
    for data in ("[]", "{", "x"):
        with pytest.raises(CallFailed) as caught:
            await client.call(enrolled.path, DEVICE, "SetData", "ssa{sv}", ["", data, {}])
        assert caught.value.name == INVALID
    remove = ("sa{sv}a{sv}", ["", fd(0), {}])
    assert await refused(client, enrolled, "Remove", *remove, BACKUP) == ERROR + "LastKeyslot"
    assert await refused(client, enrolled, "Remove", *remove, b"wrong") == ERROR + "WrongCredential"
    assert (await plan(client, enrolled, "remove"))[1] == [("keyslot", "remove"), ("token", "remove"), ("area", "wipe")]
    result = await done(client, enrolled, "Remove", *remove, OLD)
    assert (result["generation"], result["keyslot"]) == (0, -1)
    assert (enrolled.opens(BACKUP), enrolled.opens(OLD)) == (False, True)
    assert enrolled.metadata()["tokens"] == {}


async def test_a_keyslot_of_another_tool_is_adopted_and_released(daemon, client, volume):
    makeimage.add_key(volume.node, OLD, BACKUP)
    makeimage.import_token(volume.node, {"type": "acme", "keyslots": ["1"], "secret": "planted"}, 4)
    await settled(client, volume.path, Keyslots=[0, 1])
    before = volume.metadata()
    adopt = ("usa{sv}a{sv}", [1, "desk", fd(0), {"data": Variant("s", '{"at": "desk"}')}])
    _, differences = await client.call(
        volume.path, DEVICE, "Plan", "ssa{sv}", ["adopt", "desk", {"keyslot": Variant("u", 1)}]
    )
    assert [(what, name, how) for what, name, how, _, _ in differences] == [("token", "4", "change")]
    assert "planted" not in str(differences)
    assert await refused(client, volume, "Adopt", *adopt, OLD) == ERROR + "WrongCredential"
    result = await done(client, volume, "Adopt", *adopt, BACKUP)
    assert (result["name"], result["keyslot"]) == ("desk", 1)
    assert [key["adopted"] for key in await keys(client, volume)] == [True]
    assert volume.pairs() == [("desk", 1)]
    assert await refused(client, volume, "Adopt", *adopt, BACKUP) == ERROR + "KeyExists"
    await done(client, volume, "Release", "sa{sv}", ["desk", {}])
    assert volume.metadata() == before
    await done(client, volume, "Adopt", "usa{sv}a{sv}", [0, "", {}, {}])  # on the caller's word
    assert ("backup", 0) in volume.pairs()


async def test_token_and_pair_are_recreated(enrolled, client, tmp_path):
    data = {"data": Variant("s", '{"a": 2}')}
    await done(client, enrolled, "Release", "sa{sv}", ["", {}])
    assert enrolled.pairs() == []
    assert await refused(client, enrolled, "Recreate", KEY, ["", fd(0), {}, {}], BACKUP) == INVALID
    await done(client, enrolled, "Recreate", KEY, ["", fd(0), {}, data], BACKUP)
    assert enrolled.pairs() == [("backup", 1)]

    await done(client, enrolled, "Remove", "sa{sv}a{sv}", ["", fd(0), {}], OLD)
    await done(client, enrolled, "Recreate", KEY, ["", fd(0), fd(1), {**FAST, **data}], OLD, NEW)
    assert enrolled.opens(NEW)

    await done(client, enrolled, "Remove", "sa{sv}a{sv}", ["", fd(0), {}], OLD)
    by_volume_key = {**FAST, **data, "volume-key": Variant("b", True)}
    dump = ("luksDump", "--dump-volume-key", "--volume-key-file", str(tmp_path / "volume-key"))
    makeimage.run(*dump, "--key-file", "-", enrolled.node, stdin=OLD)
    volume_key = (tmp_path / "volume-key").read_bytes()
    arguments = (KEY, ["", fd(0), fd(1), by_volume_key])
    assert await refused(client, enrolled, "Recreate", *arguments, OLD, BACKUP) == ERROR + "WrongCredential"
    await done(client, enrolled, "Recreate", *arguments, volume_key, BACKUP)
    assert (enrolled.opens(BACKUP), enrolled.opens(NEW), enrolled.opens(OLD)) == (True, False, True)
    for new, options in (({}, by_volume_key), ({}, FAST)):
        with pytest.raises(CallFailed) as caught:
            await job(client, enrolled, "Recreate", KEY, ["", fd(0), new, options], OLD)
        assert caught.value.name == INVALID


async def test_what_is_not_used_is_overwritten(enrolled, client):
    space = view(parse_pair(content(enrolled))).free
    planted = b"planted-key-material" * 100
    overwrite(enrolled, space[-1].offset, planted)
    before = enrolled.headers()
    generation = await client.get(enrolled.path, DEVICE, "Generation")
    assert await refused(client, enrolled, "Scrub", "a{sv}", [only_at(generation - 1)]) == ERROR + "StaleGeneration"
    result = await done(client, enrolled, "Scrub", "a{sv}", [only_at(generation)])
    assert result == {"bytes": sum(gap.size for gap in space)}
    assert enrolled.headers() == before
    assert b"planted-key-material" not in content(enrolled)
    assert (enrolled.opens(BACKUP), enrolled.opens(OLD)) == (True, True)


async def test_somebody_who_was_faster(enrolled, client):
    """Between Plan and the verb another tool writes: what was planned is not done."""
    for method in ("Enroll", "Rotate", "Stage"):
        name = "other" if method == "Enroll" else ""
        generation, _ = await plan(client, enrolled, method.lower(), name)
        makeimage.import_token(enrolled.node, {"type": "acme", "keyslots": []}, 20)
        makeimage.run("token", "remove", "--token-id", "20", enrolled.node)
        arguments = (KEY, [name, fd(0), fd(1), {**FAST, **only_at(generation)}])
        assert await refused(client, enrolled, method, *arguments, OLD, NEW) == ERROR + "StaleGeneration"
    assert enrolled.pairs() == [("backup", 1)]


async def test_what_cannot_be_asked_for(enrolled, client):
    good = memfd(OLD)
    for method, signature, body in (
        ("Finish", "sa{sv}", ["", {"key-generation": Variant("t", 1)}]),
        ("Finish", "sa{sv}", ["", {"data": Variant("s", "{}")}]),
        ("Finish", "sa{sv}", ["x" * 65, {}]),
        ("Finish", "sa{sv}", ["", {"group": Variant("s", "x" * 65)}]),
        ("GetData", "sa{sv}", ["../backup", {}]),
        ("Stage", KEY, ["", fd(0), {}, {}]),
        ("Stage", KEY, ["", fd(0), {"generate": Variant("b", True)}, {"expires": Variant("t", 2**63)}]),
        ("Remove", "sa{sv}a{sv}", ["", {}, {}]),
        ("Remove", "sa{sv}a{sv}", ["", {"generate": Variant("b", True)}, {}]),
        ("Adopt", "usa{sv}a{sv}", [0, "", {"nonsense": Variant("s", "")}, {}]),
        ("Scrub", "a{sv}", [{"name": Variant("s", "")}]),
        ("Plan", "ssa{sv}", ["scrub", "", {}]),
        ("Plan", "ssa{sv}", ["set-data", "", {}]),
        ("Plan", "ssa{sv}", ["finish", "", {"keyslot": Variant("u", 0)}]),
        ("Plan", "ssa{sv}", ["reconcile", "backup", {}]),
        ("Plan", "ssa{sv}", ["rotate", "a b", {}]),
        ("Reconcile", "a{sv}", [{"retire-expired": Variant("s", "yes")}]),
    ):
        with pytest.raises(CallFailed) as caught:
            await client.call(enrolled.path, DEVICE, method, signature, body, fds=[good])
        assert caught.value.name == INVALID, (method, body)
    os.close(good)


async def test_a_path_that_is_too_long_is_no_device(enrolled, client):
    for dots, found in ((100, True), (2100, False)):
        call = client.call(names.ROOT_PATH, MANAGER, "GetDevice", "sa{sv}", ["/." * dots + enrolled.node, {}])
        if found:
            assert await call == [enrolled.path]
            continue
        with pytest.raises(CallFailed) as caught:
            await call
        assert caught.value.name == ERROR + "UnknownDevice"


async def test_staged_keys_that_have_expired_go_on_request(enrolled, client):
    assert (await ended(client, await start(client, enrolled.path, "Stage")))["State"] == "finished"
    forget(enrolled)
    found, left = await client.call(enrolled.path, DEVICE, "Reconcile", "a{sv}", [{}])
    assert [row[:2] for row in left] == [["staged-expired", "person"]]
    options = {"retire-expired": Variant("b", True)}
    assert ("keyslot", "remove") in (await plan(client, enrolled, "reconcile", **options))[1]
    dry = {**options, "dry-run": Variant("b", True)}
    found, left = await client.call(enrolled.path, DEVICE, "Reconcile", "a{sv}", [dry])
    assert ([row[:2] for row in found], enrolled.opens(NEW)) == ([["staged-expired", "repair"]], True)
    found, left = await client.call(enrolled.path, DEVICE, "Reconcile", "a{sv}", [options])
    assert ([row[:2] for row in found], left) == ([["staged-expired", "repair"]], [])
    assert (enrolled.opens(NEW), enrolled.opens(BACKUP)) == (False, True)


async def test_what_the_configuration_says_holds_where_the_caller_says_nothing(bed, client, volume, tmp_path):
    """Key derivation, and when a staged key expires; such a key goes when its volume is seen again."""
    text = "[KeyDerivation]\nType=pbkdf2\nIterations=1234\n[Staged]\nExpire=1h\nRetireExpired=yes\n"
    (tmp_path / "luksrotd.conf").write_text(text)
    async with running(bed, client, config=str(tmp_path)):
        await appeared(client, volume.path)
        await done(client, volume, "Enroll", KEY, ["", fd(0), fd(1), {}], OLD, BACKUP)
        await done(client, volume, "Stage", KEY, ["", fd(0), fd(1), {}], OLD, NEW)
        keyslots = volume.metadata()["keyslots"]
        assert [keyslots[number]["kdf"].get("iterations") for number in ("1", "2")] == [1234, 1234]
        _, staged = await keys(client, volume)
        rotated, expires = (datetime.fromisoformat(staged[name]) for name in ("rotated-at", "expires-at"))
        assert expires - rotated == timedelta(hours=1)
    forget(volume)
    assert volume.opens(NEW)
    async with running(bed, client, config=str(tmp_path)):
        await settled(client, volume.path, Keyslots=[0, 1])
    assert (volume.opens(NEW), volume.opens(BACKUP)) == (False, True)


async def test_all_volumes_are_reconciled_at_once(bed, enrolled, client):
    with disk(bed, "second") as second:
        await appeared(client, second.path)
        for volume in (enrolled, second):
            overwrite(volume, 4096, bytes(512))
        options = {"dry-run": Variant("b", True)}
        call = (names.ROOT_PATH, MANAGER, "Reconcile", "a{sv}")
        (dry,) = await client.call(*call, [options])
        assert {path for path, *_ in dry} == {enrolled.path, second.path}
        (found,) = await client.call(*call, [{}])
        for path, before, left, error in found:
            assert (path in (enrolled.path, second.path), left, error) == (True, [], "")
            assert [row[0] for row in before] == ["header-copy-bad"]
        (again,) = await client.call(*call, [{}])
        assert [row[1:] for row in again] == [[[], [], ""]] * 2
        for volume in (enrolled, second):
            assert volume.headers()[:16384][4096:] == volume.headers()[16384:][4096:]
