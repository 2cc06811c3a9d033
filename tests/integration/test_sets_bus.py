# SPDX-License-Identifier: GPL-2.0-or-later
"""Sets of volumes over D-Bus, judged by real cryptsetup."""

import os
from contextlib import ExitStack

import pytest
import pytest_asyncio
from dbus_next.signature import Variant

from luksrotd import names
from tests.support.busclient import CallFailed
from tests.support.daemon_process import (
    BACKUP,
    FAST,
    NEW,
    OLD,
    appeared,
    disk,
    ended,
    memfd,
    running,
    start,
    take_key,
)

pytestmark = pytest.mark.asyncio
DEVICE, MANAGER = names.DEVICE_INTERFACE, names.MANAGER_INTERFACE
ERROR = names.ERROR_PREFIX
INVALID = "org.freedesktop.DBus.Error.InvalidArgs"
STAGE = "aosa{sv}a{sv}a{sv}"


@pytest_asyncio.fixture
async def volumes(bed, client):
    """Two volumes with the same managed key, on one daemon."""
    with ExitStack() as stack:
        found = [stack.enter_context(disk(bed, name)) for name in ("one", "two")]
        async with running(bed, client):
            for volume in found:
                await appeared(client, volume.path)
                job = await start(client, volume.path, "Enroll", new=BACKUP)
                assert (await ended(client, job))["State"] == "finished"
            yield found


async def call(client, method, signature, body, *secrets):
    fds = [memfd(secret) for secret in secrets]
    try:
        return await client.call(names.ROOT_PATH, MANAGER, method, signature, body, fds=fds)
    finally:
        for fd in fds:
            os.close(fd)


async def stage(client, volumes, *, old=OLD, new=NEW, **options):
    """A job."""
    paths = [volume.path for volume in volumes]
    secrets = [{"fd": Variant("h", 0)}, {"fd": Variant("h", 1)} if new else {"generate": Variant("b", True)}]
    given = [old, new] if new else [old]
    (job,) = await call(client, "Stage", STAGE, [paths, "", *secrets, {**FAST, **options}], *given)
    return job


async def end(client, method, volumes, **options):
    """The properties of an ended job."""
    (job,) = await call(client, method, "aosa{sv}", [[volume.path for volume in volumes], "", options])
    return await ended(client, job)


async def status(client, volumes):
    paths = [volume.path for volume in volumes]
    found, members = await call(client, "GetSetStatus", "aosa{sv}", [paths, "", {}])
    assert [member["device"].value for member in members] == paths
    return {name: value.value for name, value in found.items()}, [member["standing"].value for member in members]


def members(properties):
    """What happened to each volume, and the error's name."""
    return [(member["happened"].value, member["error"].value) for member in properties["Result"]["members"].value]


def opening(volumes, secret):
    return [volume.opens(secret) for volume in volumes]


async def test_a_set_gets_the_same_new_key(volumes, client):
    paths = [volume.path for volume in volumes]
    found, standings = await status(client, volumes)
    assert (found["state"], found["group"], found["steps"], standings) == ("unstaged", "", ["stage"], ["old", "old"])
    job = await stage(client, volumes, expires=Variant("t", 60))
    done = await ended(client, job)
    assert (done["State"], done["Kind"], done["Devices"], done["KeyName"]) == ("finished", "stage", paths, "backup")
    assert members(done) == [("staged", ""), ("staged", "")]
    result = {name: value.value for name, value in done["Result"].items()}
    assert (result["name"], result["group-size"], result["state"]) == ("backup", 2, "staged")
    assert [member["generation"].value for member in result["members"]] == [2, 2]
    found, standings = await status(client, volumes)
    assert (found["group"], found["state"], standings) == (result["group"], "staged", ["staged", "staged"])
    shown = await client.get(paths[1], DEVICE, "Keys")
    staged = next(key for key in shown if key["state"].value == "staged")
    assert (staged["group"].value, staged["group-size"].value) == (result["group"], 2)
    assert staged["expires-at"].value
    assert opening(volumes, NEW) == opening(volumes, BACKUP) == [True, True]

    # One of them alone goes no way of its own, unless its caller knows of the set.
    (job,) = await client.call(paths[0], DEVICE, "Finish", "sa{sv}", ["", {}])
    assert (await ended(client, job))["ErrorName"] == ERROR + "NeedsPerson"
    done = await end(client, "Finish", volumes, group=Variant("s", "another"))
    assert (done["State"], done["Result"]) == ("failed", {})
    group = {"group": Variant("s", result["group"])}
    (job,) = await client.call(paths[0], DEVICE, "Finish", "sa{sv}", ["", group])
    assert (await ended(client, job))["State"] == "finished"
    assert (await status(client, volumes))[0]["state"] == "finishing"
    done = await end(client, "Abort", volumes)
    assert (done["State"], done["ErrorName"]) == ("failed", ERROR + "NeedsPerson")
    done = await end(client, "Finish", volumes, **group)
    assert (done["State"], members(done)) == ("finished", [("already", ""), ("finished", "")])
    assert (await status(client, volumes))[0]["state"] == "finished"
    assert (opening(volumes, NEW), opening(volumes, BACKUP)) == ([True, True], [False, False])
    assert [volume.pairs()[0][0] for volume in volumes] == ["backup", "backup"]


@pytest.mark.parametrize("keep", [False, True])
async def test_a_set_of_which_one_fails_is_told_volume_by_volume(volumes, client, keep):
    """The credential opens the first volume only."""
    done = await ended(client, await stage(client, volumes))
    assert (await end(client, "Abort", volumes))["State"] == "finished"
    only_first = b"opens the first volume only"
    job = await start(client, volumes[0].path, "Enroll", new=only_first, name="own")
    assert (await ended(client, job))["State"] == "finished"
    job = await stage(client, volumes, old=only_first, keep=Variant("b", keep))
    done = await ended(client, job)
    assert (done["State"], done["ErrorName"]) == ("failed", ERROR + "WrongCredential")
    assert done["Outcome"] == ("committed" if keep else "unchanged")
    first = "staged" if keep else "undone"
    assert members(done) == [(first, ""), ("failed", ERROR + "WrongCredential")]
    assert done["Result"]["state"].value == ("partly-staged" if keep else "unstaged")
    assert opening(volumes, NEW) == [keep, False]
    if keep:
        done = await ended(client, await stage(client, volumes))
        assert members(done) == [("already", ""), ("staged", "")]
    assert opening(volumes, BACKUP) == [True, True]


async def test_one_generated_key_for_all(volumes, client):
    job = await stage(client, volumes, new=None)
    key = await take_key(client, job)
    assert (await ended(client, job))["State"] == "finished"
    assert opening(volumes, key) == [True, True]
    assert (await end(client, "Finish", volumes))["State"] == "finished"
    assert opening(volumes, BACKUP) == [False, False]


async def test_a_set_that_cannot_be_is_refused_at_once(bed, volumes, client):
    paths = [volume.path for volume in volumes]
    before = [volume.headers() for volume in volumes]
    unknown = f"{names.DEVICE_PATH}/11111111_2222_4333_8444_555555555555"
    secrets = [{"fd": Variant("h", 0)}, {"fd": Variant("h", 1)}]
    for devices, error in (
        ([], INVALID),
        ([paths[0], paths[0]], INVALID),
        ([*paths, unknown], ERROR + "UnknownDevice"),
        ([names.ROOT_PATH], ERROR + "UnknownDevice"),
    ):
        for method, signature, body in (
            ("Stage", STAGE, [devices, "", *secrets, FAST]),
            ("Finish", "aosa{sv}", [devices, "", {}]),
            ("Abort", "aosa{sv}", [devices, "", {}]),
            ("GetSetStatus", "aosa{sv}", [devices, "", {}]),
        ):
            with pytest.raises(CallFailed) as caught:
                await call(client, method, signature, body, OLD, NEW)
            assert caught.value.name == error, (method, devices)
    with disk(bed, "clone", clone_of=volumes[1]) as clone:
        while len(await client.get(paths[1], DEVICE, "Nodes")) < 2:
            await client.signal("PropertiesChanged")
        assert clone.path == paths[1]
        with pytest.raises(CallFailed) as caught:
            await stage(client, volumes)
        assert caught.value.name == ERROR + "NeedsPerson"
    assert [volume.headers() for volume in volumes] == before
