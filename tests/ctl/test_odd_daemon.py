# SPDX-License-Identifier: GPL-2.0-or-later
"""luksrotctl and a daemon that is of another version, or goes in the middle: the true outcome, and no lost key."""

import asyncio
import os

import pytest
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from luksrotd import names
from luksrotd.ctl import remote
from luksrotd.ctl.connection import Connection
from luksrotd.ctl.delivery import ToFile
from luksrotd.ctl.model import Device, KeyRequest
from luksrotd.errors import Internal, InvalidRequest, LuksrotdError, Outcome, Unreachable

pytestmark = pytest.mark.asyncio

JOB = f"{names.JOB_PATH}/1"
DEVICE = Device("/dev/sda2")
RESULT = {
    "name": Variant("s", "backup"),
    "generation": Variant("u", 2),
    "keyslot": Variant("i", 1),
    "seqid-before": Variant("t", 5),
    "seqid-after": Variant("t", 9),
}
SUCCESS = [True, "committed", "", ""]


def signal(member, body, path=JOB):
    return Message(message_type=MessageType.SIGNAL, path=path, interface="i.f", member=member, body=body)


def stage(name):
    return signal("PropertiesChanged", [names.JOB_INTERFACE, {"Stage": Variant("s", name)}, []])


class Daemon:
    """What a ``Connection`` gets: replies by method (an error is raised), and the signals after the job's start."""

    def __init__(self, replies, *signals):
        self.owner = ""
        self.signals = asyncio.Queue()
        usual = {"GetDevice": ["/dev/1"], "Rotate": [JOB], "Cancel": [], "ConfirmKey": [], "Plan": [0, []]}
        self._replies = {**usual, "GetAll": [{"Result": Variant("a{sv}", {})}], **replies}
        self._signals = signals

    async def listen(self):
        pass

    async def call(self, path, member, *_, **__):
        reply = self._replies[member[1]]
        if isinstance(reply, Exception):
            raise reply
        self.owner = ":1.7"
        if member[1] == "Rotate":
            for one in self._signals:
                self.signals.put_nowait(one)
        if member[1] == "TakeKey":
            key = os.memfd_create("key")
            os.write(key, b"generated")
            return Message(path=path, member="X", interface="i.f", body=reply, unix_fds=[key])
        return Message(path=path, member="X", interface="i.f", body=reply)

    properties = Connection.properties

    def close(self):
        pass


@pytest.fixture
def backend(monkeypatch):
    def make(replies, *signals):
        daemon = Daemon(replies, *signals)
        monkeypatch.setattr(remote, "Connection", lambda: daemon)
        return remote.Remote()

    return make


async def rotate(backend, new=None):
    return await backend.change(DEVICE, KeyRequest("rotate", "backup", 0, new), lambda _: None)


async def test_the_result_of_a_job_cannot_be_read_any_more(backend, tmp_path):
    gone = Internal("cannot find the object")
    given = backend({"TakeKey": [0], "GetAll": gone}, stage("delivering"), signal("Completed", SUCCESS))
    with pytest.raises(Internal) as raised, ToFile(str(tmp_path / "key")) as output:
        await rotate(given, output)
    assert raised.value.outcome is Outcome.COMMITTED
    assert (tmp_path / "key").read_bytes() == b"generated"  # it opens the volume now


@pytest.mark.parametrize(("path", "starts"), [(names.ROOT_PATH, True), (JOB, False)])
async def test_to_ask_for_a_job_starts_no_daemon(monkeypatch, path, starts):
    sent = []

    async def record(_, message, __):
        sent.append(message)
        return Message(path=path, member="X", interface="i.f", sender=":1.7")

    monkeypatch.setattr(Connection, "_send", record)
    await Connection().call(path, (names.JOB_INTERFACE, "Cancel"))
    assert [MessageFlag.NO_AUTOSTART not in message.flags for message in sent] == [starts]


async def test_a_job_that_failed_says_why_even_then(backend):
    ended = [False, "unchanged", f"{names.ERROR_PREFIX}Conflict", "cannot commit"]
    with pytest.raises(LuksrotdError, match="cannot commit") as raised:
        await rotate(backend({"GetAll": Unreachable("cannot reach it")}, signal("Completed", ended)))
    assert (raised.value.code, raised.value.outcome) == ("Conflict", Outcome.UNCHANGED)


@pytest.mark.parametrize("missing", RESULT)
async def test_a_result_of_another_version(backend, missing):
    result = Variant("a{sv}", {name: value for name, value in RESULT.items() if name != missing})
    with pytest.raises(Internal, match=f"cannot understand luksrotd: '{missing}' is missing") as raised:
        await rotate(backend({"GetAll": [{"Result": result}]}, signal("Completed", SUCCESS)))
    assert raised.value.outcome is Outcome.COMMITTED


@pytest.mark.parametrize("odd", [signal("Completed", [True]), signal("PropertiesChanged", [])])
async def test_signals_of_another_version(backend, odd):
    with pytest.raises(Internal, match="cannot understand luksrotd") as raised:
        await rotate(backend({}, odd))
    assert raised.value.outcome is Outcome.UNKNOWN


@pytest.mark.parametrize("fd", ["no number", 1])
async def test_no_key_where_one_should_be(backend, fd, tmp_path):
    ended = [False, "unchanged", f"{names.ERROR_PREFIX}Cancelled", "cannot go on"]
    given = backend({"TakeKey": [fd]}, stage("delivering"), signal("Completed", ended))
    with pytest.raises(Internal, match="cannot understand luksrotd"), ToFile(str(tmp_path / "key")) as output:
        await rotate(given, output)
    assert list(tmp_path.iterdir()) == []


async def test_volumes_of_another_version(backend):
    given = backend({"GetDevices": [["/dev/1"]], "GetAll": [{"Node": Variant("s", "/dev/sda2")}]})
    assert await given.devices() == [DEVICE]
    with pytest.raises(Internal, match="'Keys' is missing"):
        await given.volume(DEVICE, data=True)
    with pytest.raises(Internal, match="'UUID' is missing"):
        await given.volume(DEVICE, data=False)


async def test_a_record_of_another_version(backend):
    entry = {"message": Variant("s", "key rotated")}
    with pytest.raises(Internal, match="'time' is missing"):
        await backend({"GetHistory": [[entry]]}).history(None, 0, 1)


@pytest.mark.parametrize(
    ("method", "work"),
    [
        ("GetSetStatus", lambda given: given.set_status([DEVICE], "backup", None)),
        ("GetHistory", lambda given: given.history(None, 0, 1)),
        ("Reconcile", lambda given: given.reconcile(DEVICE, dry_run=True)),
        ("Plan", lambda given: given.reconcile(DEVICE, dry_run=True)),
        ("VerifyKey", lambda given: given.verify(DEVICE, "backup", 0)),
        ("GetDevice", lambda given: given.verify(DEVICE, "backup", 0)),
        ("GetDevices", lambda given: given.devices()),
    ],
)
async def test_replies_of_another_version(backend, method, work):
    with pytest.raises(Internal, match="cannot understand luksrotd") as raised:
        await work(backend({"Reconcile": [[], []], method: []}))
    assert raised.value.outcome is Outcome.UNCHANGED


async def test_a_daemon_that_cannot_plan(backend):
    refused = InvalidRequest("cannot find the method")
    done = await backend({"Reconcile": [[], []], "Plan": refused}).reconcile(DEVICE, dry_run=True)
    assert done.differences is None


async def test_a_daemon_that_was_replaced_before_the_job_began(backend):
    before = signal("NameOwnerChanged", [names.BUS_NAME, ":1.6", ""], "/org/freedesktop/DBus")
    came = signal("NameOwnerChanged", [names.BUS_NAME, "", ":1.7"], "/org/freedesktop/DBus")
    given = backend({"GetAll": [{"Result": Variant("a{sv}", RESULT)}]}, before, came, signal("Completed", SUCCESS))
    assert (await rotate(given)).generation == 2


async def test_a_daemon_that_goes(backend, tmp_path):
    gone = signal("NameOwnerChanged", [names.BUS_NAME, ":1.7", ""], "/org/freedesktop/DBus")
    given = backend({"TakeKey": [0], "ConfirmKey": Unreachable("cannot reach it")}, stage("delivering"), gone)
    with pytest.raises(Unreachable) as raised, ToFile(str(tmp_path / "key")) as output:
        await rotate(given, output)
    assert raised.value.outcome is Outcome.UNKNOWN
    assert (tmp_path / "key").read_bytes() == b"generated"  # it may have been confirmed


@pytest.mark.parametrize("generation", [-1, 2**32])
async def test_a_number_that_no_message_holds(backend, generation):
    with pytest.raises(InvalidRequest):
        await backend({}).change(DEVICE, KeyRequest("finish", "backup", generation=generation), lambda _: None)
