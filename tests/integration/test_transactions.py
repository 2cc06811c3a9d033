# SPDX-License-Identifier: GPL-2.0-or-later
"""Transactions over the real bus, with real udev and loop devices; clients that are killed; judged by cryptsetup."""

import asyncio
import json
import os
import resource
import signal
import time
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from dbus_next.signature import Variant

from luksrotd import names
from tests.integration.test_jobs import until, workers_of
from tests.support import forge, makeimage
from tests.support.busclient import BusClient, CallFailed, Remote
from tests.support.daemon_process import (
    FAST,
    NEW,
    OLD,
    WAIT_SECONDS,
    appeared,
    disk,
    ended,
    memfd,
    reached,
    running,
    take_key,
)

pytestmark = pytest.mark.asyncio
DEVICE, TRANSACTION, JOB = names.DEVICE_INTERFACE, names.TRANSACTION_INTERFACE, names.JOB_INTERFACE
INVALID = "org.freedesktop.DBus.Error.InvalidArgs"
UNKNOWN_OBJECT = "org.freedesktop.DBus.Error.UnknownObject"
LIMITS = "org.freedesktop.DBus.Error.LimitsExceeded"
ERROR = names.ERROR_PREFIX
NOTE = {"type": "note", "keyslots": []}
TOKEN = json.dumps(NOTE)


def pipe(secret):
    """The end of a pipe that the secret comes out of."""
    ours, theirs = os.pipe()
    os.write(theirs, secret)
    os.close(theirs)
    return ours


class Composer:
    """A transaction, and a client that calls its methods."""

    def __init__(self, client, path):
        self.client = client
        self.path = path

    @classmethod
    async def begin(cls, client, volume, **options):
        (path,) = await client.call(volume.path, DEVICE, "BeginTransaction", "a{sv}", [options])
        return cls(client, path)

    async def call(self, member, signature, *body, fds=()):
        keywords = {"fds": fds} if fds else {}  # a client of another process can pass none
        result = await self.client.call(self.path, TRANSACTION, member, signature, list(body), **keywords)
        return result[0] if result else None

    async def with_secret(self, member, secret, *, source=memfd, **options):
        """Unlock or AddKeyslot."""
        if secret is None:
            return await self.call(member, "a{sv}a{sv}", {"generate": Variant("b", True)}, options)
        if isinstance(secret, Path):
            return await self.call(member, "a{sv}a{sv}", {"keyfile": Variant("s", str(secret))}, options)
        fd = source(secret)
        try:
            return await self.call(member, "a{sv}a{sv}", {"fd": Variant("h", 0)}, options, fds=[fd])
        finally:
            os.close(fd)

    async def unlock(self, secret=OLD, **options):
        await self.with_secret("Unlock", secret, **options)

    async def add(self, secret=NEW, **options):
        return await self.with_secret("AddKeyslot", secret, **{**FAST, **options})

    async def set_token(self, text=TOKEN, **options):
        return await self.call("SetToken", "sa{sv}", text, options)

    async def destroy(self, keyslot):
        await self.call("DestroyKeyslot", "ua{sv}", keyslot, {})

    async def remove_token(self, token):
        await self.call("RemoveToken", "ua{sv}", token, {})

    async def plan(self):
        return await self.call("Plan", "a{sv}", {})

    async def commit(self):
        return await self.call("Commit", "a{sv}", {})

    async def abort(self):
        await self.call("Abort", "a{sv}", {})

    async def properties(self):
        return await self.client.get_all(self.path, TRANSACTION)


async def refused(call):
    """The D-Bus name of the error that the call gets."""
    with pytest.raises(CallFailed) as caught:
        await call
    return caught.value.name


async def gone(client, path):
    """Wait until the object is withdrawn."""
    async with asyncio.timeout(WAIT_SECONDS):
        while (await client.signal("InterfacesRemoved")).body != [path, [TRANSACTION]]:
            pass


async def transactions(client):
    """Paths of all that are there."""
    manager = "org.freedesktop.DBus.ObjectManager"
    (objects,) = await client.call(names.ROOT_PATH, manager, "GetManagedObjects")
    return [path for path in objects if path.startswith(names.TRANSACTION_PATH)]


def open_files(daemon, volume):
    """What the daemon has open for a transaction or job: secrets, shadows, pipes from clients, the device, locks."""
    links = []
    for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(str(link.readlink()))
    wanted = ("memfd", volume.node, "/run/luksrotd/lock-", "key-of-the-test")
    return sorted(link for link in links if any(text in link for text in wanted)), sum(
        "pipe:" in link for link in links
    )


@asynccontextmanager
async def nothing_left(client, daemon, volume):
    """After the block there is nothing of what was done in it, and the header is what it was."""
    before, headers = open_files(daemon, volume), volume.headers()
    yield
    await until(lambda: open_files(daemon, volume) == before)
    await until(lambda: not workers_of(daemon.pid))
    assert await transactions(client) == []
    assert volume.headers() == headers
    assert (await appeared(client, volume.path))["Busy"] is False


@pytest.fixture
def slow(bed):
    """A volume that nobody can wait to be unlocked."""

    def patch(raw):
        raw["keyslots"]["0"]["kdf"] = {
            "type": "pbkdf2", "hash": "sha256", "iterations": 2**32 - 1, "salt": raw["keyslots"]["0"]["kdf"]["salt"],
        }  # fmt: skip

    def prepare(image):
        image.write_bytes(forge.edited(image.read_bytes(), patch))

    with disk(bed, "slow", prepare=prepare) as volume:
        yield volume


@pytest.fixture
def keys(bed):
    """Key files of root's: of the old secret and of a new one."""
    paths = []
    for name, secret in (("old", OLD), ("new", NEW)):
        path = bed.dir / f"key-of-the-test-{name}"
        path.touch(0o600)
        path.write_bytes(secret)
        paths.append(path)
    yield paths
    for path in paths:
        path.unlink()


# -- what it is for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [memfd, pipe])
async def test_any_mix_of_edits_in_one_commit(daemon, client, volume, source):
    makeimage.add_key(volume.node, OLD, b"goes")
    makeimage.import_token(volume.node, {**NOTE, "keyslots": ["1"]}, 2)
    tx = await Composer.begin(client, volume)
    seen = await tx.properties()
    assert (await client.signal("InterfacesAdded")).body[0] == tx.path
    before = volume.headers()
    await tx.unlock(source=source)
    assert [await tx.add(source=source), await tx.add(b"another", source=source, keyslot=Variant("u", 9))] == [2, 9]
    assert await tx.set_token(json.dumps({**NOTE, "keyslots": ["2"], "ä": [1, None]})) == 0
    assert await tx.set_token(token=Variant("u", 7)) == 7
    await tx.remove_token(2)
    await tx.destroy(1)
    planned = [tuple(row[:3]) for row in await tx.plan()]
    assert planned[:6] == [
        ("keyslot", "2", "add"), ("keyslot", "9", "add"), ("keyslot", "1", "remove"),
        ("token", "0", "add"), ("token", "2", "remove"), ("token", "7", "add"),
    ]  # fmt: skip
    assert [row[0::2] for row in planned[6:]] == [("area", "wipe")]
    assert volume.headers() == before, "nothing is written before the commit"
    job = await tx.commit()
    done = await ended(client, job)
    assert (done["State"], done["Kind"], done["Outcome"]) == ("finished", "transaction", "committed"), done
    assert done["Devices"] == [volume.path]
    after = await client.get_all(volume.path, DEVICE)
    result = {name: value.value for name, value in done["Result"].items()}
    assert result == {"seqid-before": seen["Generation"], "seqid-after": after["Generation"]}
    await gone(client, tx.path)
    assert await refused(tx.plan()) == UNKNOWN_OBJECT
    assert [volume.opens(OLD, 0), volume.opens(NEW, 2), volume.opens(b"another", 9)] == [True] * 3
    assert not volume.opens(b"goes")
    assert volume.metadata()["tokens"] == {"0": {**NOTE, "keyslots": ["2"], "ä": [1, None]}, "7": NOTE}


async def test_its_properties(daemon, client, volume):
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    tx = await Composer.begin(client, volume, timeout=Variant("t", 1_234_567_890))
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    shown = await tx.properties()
    assert before + 1_234_567_890 <= shown.pop("Deadline") <= after + 1_234_567_890
    assert shown == {
        "Device": volume.path, "Generation": 3, "OwnerUid": 0, "Owner": client.name, "State": "open",
        "Timeout": 1_234_567_890, "Unlocked": False,
    }  # fmt: skip
    client.signals.clear()
    await tx.unlock()
    changed = await client.signal("PropertiesChanged")
    while changed.path != tx.path:
        changed = await client.signal("PropertiesChanged")
    assert {name: value.value for name, value in changed.body[1].items()} == {"Unlocked": True}
    assert (await Composer.begin(client, volume)).path != tx.path
    assert len(await transactions(client)) == 2


async def test_a_key_can_be_generated(daemon, client, volume):
    tx = await Composer.begin(client, volume)
    await tx.unlock()
    assert await tx.add(None) == 1
    assert await refused(tx.add(None)) == INVALID
    before = volume.headers()
    job = await tx.commit()
    assert (await tx.properties())["State"] == "committing"
    await reached(client, job, Stage="delivering")
    assert volume.headers() == before
    key = await take_key(client, job)
    assert (await ended(client, job))["State"] == "finished"
    assert volume.opens(key, 1)


async def test_the_volume_key_unlocks_it_too(daemon, client, volume, bed):
    dumped = bed.dir / "volume-key"
    makeimage.run(
        "luksDump", "--batch-mode", "--dump-volume-key", "--volume-key-file", str(dumped), volume.node,
        "--key-file", "-", stdin=OLD,
    )  # fmt: skip
    tx = await Composer.begin(client, volume)
    await tx.add()
    volume_key = {"volume-key": Variant("b", True)}
    assert await refused(tx.unlock(OLD, **volume_key)) == ERROR + "WrongCredential"
    await tx.unlock(dumped.read_bytes(), **volume_key)
    dumped.unlink()
    assert (await ended(client, await tx.commit()))["State"] == "finished"
    assert volume.opens(NEW)


# -- whose it is -------------------------------------------------------------------------------------------------


async def test_nobody_but_its_owner_may_do_anything_with_it(daemon, client, volume):
    tx = await Composer.begin(client, volume)
    async with BusClient() as stranger:
        theirs = Composer(stranger, tx.path)
        calls = (
            theirs.unlock, theirs.add, theirs.set_token, partial(theirs.remove_token, 0), partial(theirs.destroy, 0),
            theirs.plan, theirs.commit, theirs.abort,
        )  # fmt: skip
        for call in calls:
            assert await refused(call()) == ERROR + "NotAuthorized"
        assert (await theirs.properties())["Owner"] == client.name
    await tx.abort()
    await gone(client, tx.path)


async def test_it_needs_a_right_of_its_own(daemon, client, volume, nobody, rules):
    with pytest.raises(CallFailed) as caught:
        await Composer.begin(nobody, volume)
    assert caught.value.name in (ERROR + "NotAuthorized", "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired")
    rules("YES")
    tx = await Composer.begin(nobody, volume)
    assert (await Composer(client, tx.path).properties())["OwnerUid"] == nobody.uid


@pytest.fixture
def few_files():
    """As many descriptors as systemd and a login shell allow, for what is started now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_there_are_descriptors_for_all_secrets_of_all_transactions(few_files, daemon, client, volume):
    opened = [await Composer.begin(client, volume) for _ in range(64)]
    for tx in opened[:40]:
        for _ in range(31):
            await tx.add()
    assert len(open_files(daemon, volume)[0]) >= 40 * 31
    assert await refused(Composer.begin(client, volume)) == LIMITS
    for tx in opened:
        await tx.abort()
    await until(lambda: not open_files(daemon, volume)[0])


async def test_one_user_has_eight(daemon, client, volume, nobody, rules):
    rules("YES")
    opened = [await Composer.begin(nobody, volume) for _ in range(8)]
    assert await refused(Composer.begin(nobody, volume)) == LIMITS
    await Composer.begin(client, volume)
    await opened[3].abort()
    await Composer.begin(nobody, volume)
    nobody.close()
    for _ in range(8):
        await client.signal("InterfacesRemoved")
    while len(await transactions(client)) > 1:
        await client.signal("InterfacesRemoved")


# -- clients that are killed -------------------------------------------------------------------------------------


@pytest.fixture
def victim(bed, rules):
    """A client of another user, which may do everything, to be killed."""
    rules("YES")
    remote = Remote(bed, bed.user("games").pw_uid)
    yield remote
    remote.close()


def kill(remote):
    os.kill(remote.pid, signal.SIGKILL)


@pytest.mark.parametrize("after", ["BeginTransaction", "Unlock", "AddKeyslot", "SetToken", "Plan"])
async def test_killed_between_two_calls(daemon, client, volume, victim, keys, after):
    async with nothing_left(client, daemon, volume):
        old, new = keys
        tx = await Composer.begin(victim, volume)
        steps = {
            "BeginTransaction": None,
            "Unlock": lambda: tx.unlock(old),
            "AddKeyslot": lambda: tx.add(None if after == "Plan" else new),
            "SetToken": tx.set_token,
            "Plan": tx.plan,
        }
        for name, step in steps.items():
            if step:
                await step()
            if name == after:
                break
        if after in ("AddKeyslot", "SetToken", "Plan"):
            assert open_files(daemon, volume)[0], "so they would be seen"
        kill(victim)
        await gone(client, tx.path)


async def test_killed_while_its_credential_is_tried(bed, client, slow, victim, keys):
    async with running(bed, client) as daemon:
        await appeared(client, slow.path)
        async with nothing_left(client, daemon, slow):
            tx = await Composer.begin(victim, slow)
            victim.send(tx.path, TRANSACTION, "Unlock", "a{sv}a{sv}", [{"keyfile": Variant("s", str(keys[0]))}, {}])
            await until(lambda: workers_of(daemon.pid))
            kill(victim)
            await gone(client, tx.path)
        assert "Traceback" not in daemon.log


async def test_killed_while_it_is_asked_for_a_right(daemon, client, volume, bed, keys):
    """polkit's question is withdrawn, and nothing was begun."""
    remote = Remote(bed, bed.user("games").pw_uid)
    bed.set_rules(
        "polkit.addRule(function (action, subject) {"
        " if (action.id.indexOf('org.luksrotd1.transaction') == 0) { return polkit.Result.YES; }"
        " if (action.id.indexOf('org.luksrotd1.') == 0) { return polkit.Result.AUTH_SELF; } });"
    )
    agent = bed.agent("ignore", remote.pid, remote.uid)
    async with nothing_left(client, daemon, volume):
        tx = await Composer.begin(remote, volume)
        body = [{"keyfile": Variant("s", str(keys[0]))}, {}]
        remote.send(tx.path, TRANSACTION, "Unlock", "a{sv}a{sv}", body, interactive=True)
        await asyncio.to_thread(agent.wait_for, "begin")
        kill(remote)
        await gone(client, tx.path)
    remote.close()
    bed.set_rules("")


async def test_killed_after_the_commit_it_goes_on(bed, client, volume, victim, keys, tmp_path):
    go, there = tmp_path / "go", tmp_path / "there"
    async with running(bed, client, hold=0, reached=str(there), go=str(go)):
        await appeared(client, volume.path)
        tx = await Composer.begin(victim, volume)
        await tx.unlock(keys[0])
        await tx.add(keys[1])
        job = await tx.commit()
        await until(there.exists)
        kill(victim)
        go.touch()
        assert (await ended(client, job))["State"] == "finished"
        await gone(client, tx.path)
    assert volume.opens(NEW)


async def test_killed_before_it_has_its_generated_key_nothing_is_committed(daemon, client, volume, victim, keys):
    async with nothing_left(client, daemon, volume):
        tx = await Composer.begin(victim, volume)
        await tx.unlock(keys[0])
        await tx.add(None)
        job = await tx.commit()
        await reached(client, job, Stage="delivering")
        kill(victim)
        assert (await ended(client, job))["State"] == "cancelled"
        await gone(client, tx.path)


# -- other ends --------------------------------------------------------------------------------------------------


async def test_its_time_is_up(daemon, client, volume):
    async with nothing_left(client, daemon, volume):
        tx = await Composer.begin(client, volume, timeout=Variant("t", 1))
        await gone(client, tx.path)
        assert await refused(tx.abort()) == UNKNOWN_OBJECT
    for timeout in (0, 3_600_000_001, 2**64 - 1):
        assert await refused(Composer.begin(client, volume, timeout=Variant("t", timeout))) == INVALID
    await (await Composer.begin(client, volume, timeout=Variant("t", 3_600_000_000))).abort()


async def test_calls_without_waiting_are_done_in_their_order(daemon, client, volume):
    """Of a pipe that ends late everything waits: the token names the keyslot, and all of it is committed."""
    tx = await Composer.begin(client, volume)
    unlocking = asyncio.ensure_future(tx.unlock())
    ours, theirs = os.pipe()
    adding = asyncio.ensure_future(
        tx.call("AddKeyslot", "a{sv}a{sv}", {"fd": Variant("h", 0)}, {**FAST, "keyslot": Variant("u", 5)}, fds=[ours])
    )
    note = {"type": "note", "keyslots": ["5"]}
    others = [tx.set_token(json.dumps(note)), tx.plan(), tx.commit(), tx.set_token()]
    setting, planning, committing, late = [asyncio.ensure_future(call) for call in others]
    await client.call(volume.path, DEVICE, "Plan", "ssa{sv}", ["enroll", "", {}])  # all others are there by then
    assert not any(call.done() for call in (setting, planning, committing, late))
    os.write(theirs, NEW)
    for fd in (ours, theirs):
        os.close(fd)
    await unlocking
    assert await adding == 5
    assert await setting == 0
    assert {what for what, *_ in await planning} >= {"keyslot", "token"}
    done = await ended(client, await committing)
    assert (done["State"], done["Outcome"]) == ("finished", "committed")
    assert await refused(late) in (INVALID, ERROR + "Cancelled", UNKNOWN_OBJECT)
    assert volume.metadata()["tokens"] == {"0": note}
    assert volume.opens(NEW, 5)


def pull(volume):
    """As when its cable is pulled: detached, a loop device that is in use would wait for its last user."""
    Path("/sys/class/block", Path(volume.node).name, "uevent").write_text("remove")


async def test_its_volume_is_pulled(daemon, client, volume):
    tx = await Composer.begin(client, volume)
    await tx.unlock()
    await tx.add()
    volume.detach()
    await gone(client, tx.path)
    await until(lambda: not [link for link in open_files(daemon, volume)[0] if "memfd" in link])


@pytest.mark.parametrize("end", ["time", "Abort", "unplugged", "SIGTERM"])
async def test_it_ends_while_its_credential_is_tried(bed, client, slow, end):
    async with running(bed, client) as daemon:
        await appeared(client, slow.path)
        tx = await Composer.begin(client, slow, timeout=Variant("t", 1_000_000 if end == "time" else 3_600_000_000))
        unlocking = asyncio.ensure_future(tx.unlock())
        if end != "time":
            await until(lambda: workers_of(daemon.pid))
        if end == "Abort":
            await tx.abort()
        if end == "unplugged":
            pull(slow)
        if end == "SIGTERM":
            daemon.terminate()
        assert await refused(unlocking) == ERROR + "Cancelled"
        await gone(client, tx.path)
        await until(lambda: not workers_of(daemon.pid))
        assert "Traceback" not in daemon.log
        if end == "SIGTERM":
            assert await daemon.ended() == 0
        else:
            assert await transactions(client) == []
            assert not [link for link in open_files(daemon, slow)[0] if "memfd" in link]


async def test_of_two_on_one_volume_the_second_is_a_conflict(daemon, client, volume):
    first, second = await Composer.begin(client, volume), await Composer.begin(client, volume)
    for tx in (first, second):
        await tx.set_token()
    jobs = [await tx.commit() for tx in (first, second)]
    results = [await ended(client, job) for job in jobs]
    assert [done["State"] for done in results] == ["finished", "failed"]
    assert (results[1]["ErrorName"], results[1]["Outcome"]) == (ERROR + "Conflict", "unchanged")
    assert volume.metadata()["tokens"] == {"0": NOTE}


async def test_so_is_one_that_cryptsetup_was_faster_than(daemon, client, volume):
    tx = await Composer.begin(client, volume)
    await tx.set_token()
    makeimage.add_key(volume.node, OLD, b"foreign")
    done = await ended(client, await tx.commit())
    assert done["ErrorName"] == ERROR + "Conflict"
    assert volume.opens(b"foreign")
    assert volume.metadata()["tokens"] == {}


async def test_only_if_the_volume_is_as_it_was_seen(daemon, client, volume):
    seen = await client.get(volume.path, DEVICE, "Generation")
    await (await Composer.begin(client, volume, **{"if-generation": Variant("t", seen)})).abort()
    for other in (0, seen + 1, 2**64 - 1):
        options = {"if-generation": Variant("t", other)}
        assert await refused(Composer.begin(client, volume, **options)) == ERROR + "StaleGeneration"


async def test_a_refusal_leaves_it_open(daemon, client, volume):
    tx = await Composer.begin(client, volume)
    assert await refused(tx.commit()) == INVALID
    await tx.destroy(0)
    assert await refused(tx.unlock(b"wrong")) == ERROR + "WrongCredential"
    await tx.unlock()
    assert [await refused(tx.plan()), await refused(tx.commit())] == [ERROR + "LastKeyslot"] * 2
    await tx.add()
    await tx.set_token(json.dumps({**NOTE, "x": "x" * 12_000}))
    assert await refused(tx.commit()) == ERROR + "MetadataFull"
    await tx.remove_token(0)
    job = await tx.commit()
    assert await refused(tx.commit()) in (INVALID, UNKNOWN_OBJECT)
    assert (await ended(client, job))["State"] == "finished"
    assert (volume.opens(NEW), volume.opens(OLD)) == (True, False)


async def test_nonsense_gets_an_error_each_and_leaves_it_as_it_was(daemon, client, volume):
    async with nothing_left(client, daemon, volume):
        tx = await Composer.begin(client, volume)
        keyslot, token = (lambda number, name=name: {name: Variant("u", number)} for name in ("keyslot", "token"))
        wrong = [
            *(partial(tx.add, **keyslot(number)) for number in (0, 32, 2**32 - 1)),
            partial(tx.add, keyslot=Variant("i", 1)),
            partial(tx.add, pbkdf=Variant("s", "md5")),
            partial(tx.add, data=Variant("s", "{}")),
            *(partial(tx.set_token, **token(number)) for number in (32, 2**32 - 1)),
            *(partial(tx.destroy, number) for number in (1, 32, 2**32 - 1)),
            *(partial(tx.remove_token, number) for number in (0, 32, 2**32 - 1)),
            *(partial(tx.set_token, text) for text in ("", "[]", "{}", "[" * 100_000, '{"x":' * 20_000)),
            partial(tx.set_token, '{"type":"note","keyslots":[],"type":"other"}'),
            partial(tx.set_token, json.dumps({**NOTE, "x": "x" * 100_000})),
            partial(tx.set_token, json.dumps({**NOTE, "type": names.TOKEN_TYPE})),
            partial(tx.unlock, unknown=Variant("b", True)),
            partial(tx.unlock, **{"volume-key": Variant("u", 1)}),
            partial(tx.call, "Unlock", "a{sv}a{sv}", {}, {}),
            partial(tx.call, "Unlock", "a{sv}a{sv}", {"fd": Variant("h", 3)}, {}),
            partial(tx.call, "Unlock", "a{sv}a{sv}", {"generate": Variant("b", True)}, {}),
            partial(tx.call, "AddKeyslot", "a{sv}a{sv}", {"generate": Variant("b", False)}, {}),
            partial(tx.call, "Commit", "a{sv}", {"now": Variant("b", True)}),
        ]
        for number, call in enumerate(wrong):
            assert await refused(call()) == INVALID, number
        assert await refused(tx.set_token("x" * 20_000_000)) == LIMITS
        for path in ("/", "/dev/zero", "pipe"):

            def source(_, path=path):
                return pipe(b"") if path == "pipe" else os.open(path, os.O_RDONLY)

            assert await refused(tx.unlock(source=source)) == ERROR + "SecretRejected"
            assert await refused(tx.add(source=source)) == ERROR + "SecretRejected"
        assert await refused(tx.plan()) == INVALID
        deep = json.dumps({**NOTE, "x": json.loads("[" * 27 + "]" * 27)})
        await tx.set_token(deep)
        assert await tx.plan() == [["token", "0", "add", {}, (await tx.plan())[0][4]]]
        await tx.abort()
        await gone(client, tx.path)
    assert "Traceback" not in daemon.log


async def test_sigterm_drops_those_that_are_open(bed, client, volume):
    async with running(bed, client) as daemon:
        await appeared(client, volume.path)
        before = volume.headers()
        tx = await Composer.begin(client, volume)
        await tx.unlock()
        await tx.add()
        daemon.terminate()
        await gone(client, tx.path)
        assert await daemon.ended() == 0, daemon.log
        assert "Traceback" not in daemon.log
    assert volume.headers() == before
