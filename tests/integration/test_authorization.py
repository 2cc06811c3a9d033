# SPDX-License-Identifier: GPL-2.0-or-later
"""Every method that the daemon exports, put to every kind of caller, by the real polkitd and real agents.

The rows are what introspection shows, the actions are what dbus/*.xml promises, so that a new method has its row, or
makes this fail.  What polkit was asked is seen on the bus.
"""

import asyncio
import os
import re
import signal
from collections import namedtuple
from contextlib import asynccontextmanager, suppress
from functools import cache
from itertools import product
from xml.etree import ElementTree

import pytest
import pytest_asyncio
from dbus_next.signature import Variant

from luksrotd import names
from tests.bus.monitor import Monitor
from tests.support.busclient import PROPERTIES, BusClient, CallFailed, Remote
from tests.support.daemon_process import FAST, OLD, WAIT_SECONDS, appeared, disk, owner
from tests.support.testbed import PROJECT

pytestmark = pytest.mark.asyncio
INTROSPECTABLE, PEER = "org.freedesktop.DBus.Introspectable", "org.freedesktop.DBus.Peer"
OWNER, STRANGER, CHALLENGED, BORROWER = "games", "nobody", "man", "lp"
RULES = """
polkit.addRule(function (action, subject) {
    if (action.id.indexOf("org.luksrotd1.") == 0 && subject.user != "root") {
        var results = { "games": polkit.Result.YES, "nobody": polkit.Result.NO, "man": polkit.Result.AUTH_ADMIN };
        if (subject.user != "lp") {
            return results[subject.user];
        }
        if (action.id.indexOf(".use-") > 0) {
            return polkit.Result.AUTH_ADMIN;
        }
        return action.id.indexOf(".generate-key") > 0 ? polkit.Result.NO : polkit.Result.YES;
    }
});
"""
KEYFILE = {"keyfile": Variant("s", "/nowhere")}
NO_KEY = "no-such-key"
PAST = "past"
NO = names.ERROR_PREFIX + "NotAuthorized"
NEEDS_A_PERSON = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"
#: Not errors of a method: it was not reached.
MISSED = re.compile(r"org\.freedesktop\.DBus\.Error\.(Unknown|AccessDenied|NoReply|ServiceUnknown|Timeout)")
SILENT, WITH_A_PERSON = 0, 1

Row = namedtuple("Row", "path interface method signature arguments action")
Asked = namedtuple("Asked", "action flags details cancellation")


class Column:
    """A kind of caller: how it calls, and what becomes of a method that polkit decides about."""

    def __init__(self, client, verdict, *flags, interactive=False):
        self.client = client
        self.verdict = verdict
        self.flags = flags
        self.interactive = interactive


# -- the rows ----------------------------------------------------------------------------------------------------


def promised():
    """The polkit action of every method of dbus/*.xml, by interface and method; None without one."""
    found = {}
    for interface in names.INTERFACES:
        parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
        root = ElementTree.parse(PROJECT / "dbus" / f"{interface}.xml", parser).getroot()
        text = ""
        for node in root.find("interface"):
            if node.tag is ElementTree.Comment:
                text = node.text
            elif node.tag == "method":
                assert text.split()[0] == f"{node.get('name')}:"
                action = re.search(r"^\s+Action: (\S+)$", text, re.MULTILINE)
                found[interface, node.get("name")] = action[1] if action else None
    return found


async def exported(client, path):
    """All interfaces of ours below a path, introspected: (path, interface element)."""
    (text,) = await client.call(path, INTROSPECTABLE, "Introspect")
    node = ElementTree.fromstring(text)
    found = [(path, item) for item in node.findall("interface") if item.get("name").startswith(names.BUS_NAME)]
    for child in node.findall("node"):
        found += await exported(client, f"{path}/{child.get('name')}")
    return found


def argument(name, signature, volume):
    """A value that a method takes, but finds nothing for."""
    by_name = {"devices": [volume.path], "device": volume.uuid, "verb": "release", "name": NO_KEY, "json": "{}"}
    by_name |= {"data": "{}"}
    return by_name[name] if name in by_name else {"s": "", "u": 0, "a{sv}": {}}[signature]


def row(path, interface, method, actions, volume):
    arguments = [item for item in method.findall("arg") if item.get("direction") == "in"]
    return Row(
        path,
        interface,
        method.get("name"),
        "".join(item.get("type") for item in arguments),
        [argument(item.get("name"), item.get("type"), volume) for item in arguments],
        actions[interface, method.get("name")],
    )


async def all_rows(client, volume, doomed):
    """A row for each method, on one object of each interface; to be cancelled is ``doomed`` alone."""
    actions = promised()
    rows = {}
    for path, interface in await exported(client, names.ROOT_PATH):
        for method in interface.findall("method"):
            if (path == doomed) == (method.get("name") == "Cancel") or not path.startswith(names.JOB_PATH):
                rows[interface.get("name"), method.get("name")] = row(
                    path, interface.get("name"), method, actions, volume
                )
    return list(rows.values())


# -- the callers -------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(bed):
    """Starts a client of a user."""
    remotes = []

    def start(user):
        remotes.append(Remote(bed, bed.user(user).pw_uid))
        return remotes[-1]

    bed.set_rules(RULES)
    yield start
    bed.set_rules("")
    for one in remotes:
        one.close()


@pytest_asyncio.fixture
async def mine(daemon, client, volume, remote, tmp_path):
    """A user whom a rule allows everything, two jobs, one that generates a key and one behind it, and a transaction."""
    keyfile = tmp_path / "old"
    keyfile.write_bytes(OLD)
    keyfile.chmod(0o600)
    credential, generate = {"keyfile": Variant("s", str(keyfile))}, {"generate": Variant("b", True)}
    games = remote(OWNER)
    enroll = (volume.path, names.DEVICE_INTERFACE, "Enroll", "sa{sv}a{sv}a{sv}")
    transaction = await begin(games, volume)
    (job,) = await games.call(*enroll, ["", credential, generate, FAST])
    (doomed,) = await games.call(*enroll, ["other", credential, generate, FAST])
    return namedtuple("Mine", "client job doomed transaction")(games, job, doomed, transaction)


async def begin(client, volume):
    (path,) = await client.call(volume.path, names.DEVICE_INTERFACE, "BeginTransaction", "a{sv}", [{}])
    return path


@asynccontextmanager
async def on_its_own_object(row, column, mine, volume):
    """The row; a transaction's owner may end it, so each of their calls gets one of its own."""
    if row.interface != names.TRANSACTION_INTERFACE or column.client is not mine.client:
        yield row
        return
    path = await begin(mine.client, volume)
    yield row._replace(path=path)
    with suppress(CallFailed):  # it has ended; a user may have few
        await mine.client.call(path, names.TRANSACTION_INTERFACE, "Abort", "a{sv}", [{}])


@asynccontextmanager
async def watched(client):
    """Sees what polkit is asked: ``await asked(sender)`` is what since the last time."""
    async with Monitor() as seen:
        marks = iter(range(1, 10**6))

        async def asked():
            mark = f"/mark/{next(marks)}"
            await client.call(mark, PEER, "Ping")
            await seen.until(lambda message: message.path == mark)
            found = [message for message in seen.messages if message.member == "CheckAuthorization"]
            for message in seen.messages:
                for fd in message.unix_fds:
                    os.close(fd)
            seen.messages.clear()
            return [Asked(body[1], body[3], body[2], body[4]) for body in (message.body for message in found)]

        yield seen, asked


async def outcome(column, row):
    """What a call comes to: ``PAST`` authorization, or the name of its error."""
    call = column.client.call(*row[:5], interactive=column.interactive)
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            await call
    except CallFailed as error:
        return error.name if error.name in (NO, NEEDS_A_PERSON) or MISSED.match(error.name) else PAST
    return PAST


def expected(row, column, mine):
    """What must come of it, and the action and flags that polkit must be asked with."""
    if row.action is None:  # bound to the connection that began it
        return (PAST if column.client is mine.client else NO), []
    if row.method == "Cancel" and column.client is mine.client:
        return PAST, []
    return column.verdict, [(names.system_action(row.action), flag) for flag in column.flags]


@cache
def spoken_of(action):
    """The details that the agent's text has in it."""
    policy = ElementTree.parse(PROJECT / "polkit/org.luksrotd1.policy").getroot()
    return re.findall(r"\$\((\w+)\)", policy.find(f"action[@id='{action}']/message").text)


def check_details(row, asked, volume):
    """The agent can show, and rules can look up, what a question is about."""
    for question in asked:
        assert question.details["operation"] == row.method
        if NO_KEY in row.arguments:
            assert question.details["key"] == NO_KEY, row
        assert all(question.details.get(detail) for detail in spoken_of(question.action)), (row, question)
        about_volume = question.action.removesuffix("-system") in names.VOLUME_ACTIONS
        if about_volume:
            assert (question.details["device"], question.details["uuid"]) == (volume.node, volume.uuid), row
        if about_volume and row.interface == names.MANAGER_INTERFACE:
            assert question.details["set"] == volume.node, row


# -- the table ---------------------------------------------------------------------------------------------------


async def test_every_method_for_every_caller(bed, client, volume, mine, remote):
    assert await client.get(volume.path, names.DEVICE_INTERFACE, "System")
    challenged = [remote(CHALLENGED) for _ in range(3)]
    for mode, one in zip(("yes", "cancel"), challenged, strict=False):
        await asyncio.to_thread(bed.agent, mode, one.pid, one.uid)
    async with BusClient() as root:
        columns = {
            "another user, whom a rule forbids it": Column(remote(STRANGER), NO, SILENT, interactive=True),
            "no agent, not interactive": Column(challenged[2], NEEDS_A_PERSON, SILENT),
            "no agent": Column(challenged[2], NO, SILENT, WITH_A_PERSON, interactive=True),
            "an agent who is not to be asked": Column(challenged[0], NEEDS_A_PERSON, SILENT),
            "an agent who says no": Column(challenged[1], NO, SILENT, WITH_A_PERSON, interactive=True),
            "an agent who says yes": Column(challenged[0], PAST, SILENT, WITH_A_PERSON, interactive=True),
            "root": Column(root, PAST, SILENT),
            "the owner, whom a rule allows it": Column(mine.client, PAST, SILENT, interactive=True),
        }
        rows = await all_rows(client, volume, mine.doomed)
        assert {(row.interface, row.method) for row in rows} == set(promised())
        table, wanted = {}, {}
        async with watched(client) as (_, asked):
            for (name, column), row in product(columns.items(), rows):
                async with on_its_own_object(row, column, mine, volume) as own:
                    await asked()
                    came_to = await outcome(column, own)
                    questions = await asked()
                check_details(row, questions, volume)
                cell = f"{row.interface}.{row.method}: {name}"
                table[cell] = came_to, [(question.action, question.flags) for question in questions]
                wanted[cell] = expected(row, column, mine)
        assert table == wanted


async def test_the_question_is_withdrawn_when_its_caller_leaves(bed, client, volume, mine, remote):
    caller = remote(CHALLENGED)
    agent = await asyncio.to_thread(bed.agent, "ignore", caller.pid, caller.uid)
    rows = [row for row in await all_rows(client, volume, mine.doomed) if row.action]
    before = await client.get_all(mine.doomed, names.JOB_INTERFACE)
    async with watched(client) as (seen, asked):
        for row in rows:
            await asked()
            caller.send(*row[:5], interactive=True)
            begun = await asyncio.to_thread(agent.wait_for, "begin")
            assert begun["action"] == names.system_action(row.action), row
            await caller.reconnect()
            withdrawn = await seen.until(lambda message: message.member == "CancelCheckAuthorization")
            await asyncio.to_thread(agent.wait_for, "cancel")  # polkit took its dialogue away
            *_, last = await asked()
            assert (last.flags, [last.cancellation]) == (WITH_A_PERSON, withdrawn.body), row
    assert await client.get_all(mine.doomed, names.JOB_INTERFACE) == before
    assert await owner(client)


@pytest.mark.parametrize(
    ("credential", "new_secret", "refusal", "rights"),
    [
        (KEYFILE, KEYFILE, NEEDS_A_PERSON, [names.ACTION_KEYFILE]),
        ({"credential": Variant("s", "x")}, KEYFILE, NEEDS_A_PERSON, [names.ACTION_KEYFILE, names.ACTION_CREDENTIAL]),
        ({"token": Variant("i", -1)}, KEYFILE, NEEDS_A_PERSON, [names.ACTION_KEYFILE, names.ACTION_TOKEN]),
        (KEYFILE, {"generate": Variant("b", True)}, NO, [names.ACTION_KEYFILE, names.ACTION_GENERATE]),
    ],
)
async def test_each_kind_of_secret_is_asked_about_beside_the_verb(
    daemon, client, volume, remote, credential, new_secret, refusal, rights
):
    caller = remote(BORROWER)
    call = (volume.path, names.DEVICE_INTERFACE, "Rotate", "sa{sv}a{sv}a{sv}", ["", credential, new_secret, {}])
    for interactive in (False, True):
        async with watched(client) as (_, asked):
            with pytest.raises(CallFailed) as caught:
                await caller.call(*call, interactive=interactive)
            questions = await asked()
        # Interactive or not, nobody authenticates for the one where the other is refused.
        shown = interactive and refusal == NEEDS_A_PERSON
        assert caught.value.name == (NO if interactive else refusal)
        actions = [names.system_action(names.ACTION_ROTATE), *rights, *rights[:shown]]
        assert [question.action for question in questions] == actions
        assert {question.details["device"] for question in questions} == {volume.node}
        assert all(question.details.get(detail) for question in questions for detail in spoken_of(question.action))


async def test_a_set_is_asked_about_volume_by_volume(bed, daemon, client, volume, remote):
    games = remote(OWNER)
    with disk(bed, "other") as other:
        await appeared(client, other.path)
        async with watched(client) as (_, asked):
            body = [[volume.path, other.path], "", {}, {}, {}]
            with pytest.raises(CallFailed, match="InvalidArgs"):
                await games.call(names.ROOT_PATH, names.MANAGER_INTERFACE, "Stage", "aosa{sv}a{sv}a{sv}", body)
            questions = await asked()
        assert [question.action for question in questions] == [names.system_action(names.ACTION_STAGE)] * 2
        assert [question.details for question in questions] == [
            {
                "operation": "Stage",
                "device": one.node,
                "uuid": one.uuid,
                "key": "backup",
                "set": f"{volume.node} {other.node}",
            }
            for one in (volume, other)
        ]


async def test_polkit_may_come_and_go(bed, daemon, client, volume, remote):
    games = remote(OWNER)
    call = (names.ROOT_PATH, names.MANAGER_INTERFACE, "GetDevices", "a{sv}", [{}])
    assert await games.call(*call) == [[volume.path]]
    os.kill(bed.polkitd_pid, signal.SIGKILL)
    await asyncio.to_thread(bed.stop_polkitd)
    try:
        for caller in (games, client):
            with pytest.raises(CallFailed, match="NotAuthorized"):
                await caller.call(*call)
    finally:
        await asyncio.to_thread(bed.start_polkitd)
    for caller in (games, client):
        assert await caller.call(*call) == [[volume.path]]


async def test_what_the_standard_interfaces_tell_everybody_may_know(client, volume, mine, remote):
    nobody = remote(STRANGER)
    for path in (names.ROOT_PATH, volume.path, mine.job, mine.transaction):
        await nobody.call(path, INTROSPECTABLE, "Introspect")
        (properties,) = await nobody.call(path, PROPERTIES, "GetAll", "s", [""])
        for name in properties:
            with pytest.raises(CallFailed, match="PropertyReadOnly"):
                await nobody.call(path, PROPERTIES, "Set", "ssv", ["", name, Variant("s", "x")])
    (managed,) = await nobody.call(names.ROOT_PATH, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
    assert {volume.path, mine.job, mine.doomed, mine.transaction} <= set(managed)
