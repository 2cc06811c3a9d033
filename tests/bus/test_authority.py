# SPDX-License-Identifier: GPL-2.0-or-later
"""The real polkitd, asked about root, about unprivileged users, with and without an agent."""

import asyncio
import os
import signal

import pytest
import pytest_asyncio
from dbus_next.constants import MessageType
from dbus_next.message import Message

from luksrotd import names
from luksrotd.bus.authority import PolkitAuthority
from luksrotd.bus.connection import Bus
from luksrotd.bus.guard import DIALOGUES_PER_USER
from luksrotd.errors import NotAuthorized
from luksrotd.ports import Caller
from tests.bus.monitor import Monitor
from tests.bus.toy import INTERFACE, PATH, serve
from tests.support.busclient import BusClient, CallFailed, Remote

pytestmark = pytest.mark.asyncio
ROTATE = (PATH, INTERFACE, "Rotate", "sa{sv}", ["k", {}])
NOT_AUTHORIZED = "org.luksrotd1.Error.NotAuthorized"
INTERACTIVE = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"
RULES = """
polkit.addRule(function (action, subject) {
    if (action.id.indexOf("org.luksrotd1.") == 0 && action.lookup("operation") == "Rotate") {
        return polkit.Result.%s;
    }
});
"""


@pytest.fixture
def rules(bed):
    yield lambda result: bed.set_rules(RULES % result)
    bed.set_rules("")


@pytest_asyncio.fixture
async def service(bed):
    async with serve() as service:
        yield service


@pytest_asyncio.fixture
async def nobody(bed):
    remote = Remote(bed, bed.user("nobody").pw_uid)
    yield remote
    remote.close()


async def refusal(call) -> str:
    with pytest.raises(CallFailed) as caught:
        await call
    return caught.value.name


async def test_root_may(service, rules):
    rules("NO")  # root is above the rules
    async with BusClient() as client:
        assert await client.call(*ROTATE) == ["rotated k"]


async def test_a_rule_may_allow(service, rules, nobody):
    rules("YES")
    assert await nobody.call(*ROTATE) == ["rotated k"]
    assert service.toy.calls[0][0].uid == nobody.uid


async def test_a_rule_may_deny_even_with_interaction(service, rules, nobody):
    rules("NO")
    assert await refusal(nobody.call(*ROTATE, interactive=True)) == NOT_AUTHORIZED
    assert service.toy.calls == []


async def test_without_the_interactive_flag_the_caller_is_told_that_it_would_help(service, nobody):
    assert await refusal(nobody.call(*ROTATE)) == INTERACTIVE
    assert service.toy.calls == []


async def test_without_an_agent_interaction_does_not_help(service, nobody):
    assert await refusal(nobody.call(*ROTATE, interactive=True)) == NOT_AUTHORIZED


async def test_an_agent_may_say_yes(bed, service, nobody):
    agent = await asyncio.to_thread(bed.agent, "yes", nobody.pid, nobody.uid)
    assert await nobody.call(*ROTATE, interactive=True) == ["rotated k"]
    asked = await asyncio.to_thread(agent.wait_for, "begin")
    assert asked["action"] == names.ACTION_ROTATE
    assert "/dev/toy" in asked["message"]
    assert "back?up" in asked["message"]
    bed.end(agent.process)


async def test_an_agent_may_be_dismissed(bed, service, nobody):
    agent = await asyncio.to_thread(bed.agent, "cancel", nobody.pid, nobody.uid)
    with pytest.raises(CallFailed, match="dismissed") as caught:
        await nobody.call(*ROTATE, interactive=True)
    assert caught.value.name == NOT_AUTHORIZED
    assert service.toy.calls == []
    bed.end(agent.process)


async def test_without_the_flag_an_agent_is_left_in_peace(bed, service, nobody):
    agent = await asyncio.to_thread(bed.agent, "yes", nobody.pid, nobody.uid)
    assert await refusal(nobody.call(*ROTATE)) == INTERACTIVE
    bed.end(agent.process)


async def test_a_caller_that_vanishes_withdraws_the_question(bed, service, nobody, caplog):
    agent = await asyncio.to_thread(bed.agent, "ignore", nobody.pid, nobody.uid)
    async with Monitor() as seen:
        nobody.send(*ROTATE, interactive=True)
        await asyncio.to_thread(agent.wait_for, "begin")
        await seen.wait_for("Rotate")
        assert service.callers.is_known(seen.sender_of("Rotate"))
        await asyncio.to_thread(nobody.close)
        await seen.wait_for("CancelCheckAuthorization")
        await asyncio.to_thread(agent.wait_for, "cancel")  # polkit took its dialogue away
        questions = [message.body for message in seen.messages if message.member == "CheckAuthorization"]
        assert [body[3] for body in questions] == [0, 1]  # without a person first
        assert questions[1][-1] == seen.cancellation("CancelCheckAuthorization")
        assert not service.callers.is_known(seen.sender_of("Rotate"))
    assert service.toy.calls == []
    assert service.bus._tasks == set()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    bed.end(agent.process)


async def test_without_polkit_nobody_may_not_even_root(bed, service, nobody, caplog):
    await asyncio.to_thread(bed.stop_polkitd)
    try:
        assert await refusal(nobody.call(*ROTATE, interactive=True)) == NOT_AUTHORIZED
        async with BusClient() as client:
            assert await refusal(client.call(*ROTATE)) == NOT_AUTHORIZED
        assert service.toy.calls == []
    finally:
        await asyncio.to_thread(bed.start_polkitd)


async def test_polkit_dying_amid_the_question_is_a_no(bed, service, nobody, caplog):
    agent = await asyncio.to_thread(bed.agent, "ignore", nobody.pid, nobody.uid)
    asking = asyncio.ensure_future(nobody.call(*ROTATE, interactive=True))
    await asyncio.to_thread(agent.wait_for, "begin")
    await asyncio.to_thread(bed.stop_polkitd)
    try:
        assert await refusal(asking) == NOT_AUTHORIZED
    finally:
        await asyncio.to_thread(bed.start_polkitd)
        bed.end(agent.process)


async def test_when_polkit_is_back_so_are_the_rights(bed, service, nobody, caplog):
    os.kill(bed.polkitd_pid, signal.SIGKILL)
    await asyncio.to_thread(bed.stop_polkitd)
    async with BusClient() as root:
        for attempt in range(2):
            assert await refusal(root.call(*ROTATE)) == NOT_AUTHORIZED, attempt
        await asyncio.to_thread(bed.start_polkitd)
        assert await root.call(*ROTATE) == ["rotated k"]
    assert await refusal(nobody.call(*ROTATE)) == INTERACTIVE  # and no more than they were
    assert len(service.toy.calls) == 1


async def test_polkit_hanging_is_a_no_and_holds_nobody_else_up(bed, nobody):
    async with serve(polkit_seconds=2.0) as service, BusClient() as root:
        os.kill(bed.polkitd_pid, signal.SIGSTOP)
        try:
            asking = asyncio.ensure_future(root.call(*ROTATE))
            assert await nobody.call(PATH, INTERFACE, "Echo", "s", ["x"]) == ["x"]
            refusals = await asyncio.gather(refusal(asking), refusal(nobody.call(*ROTATE, interactive=True)))
            assert refusals == [NOT_AUTHORIZED] * 2
        finally:
            os.kill(bed.polkitd_pid, signal.SIGCONT)
        assert [arguments for _, arguments in service.toy.calls] == [["x"]]
        assert await root.call(*ROTATE) == ["rotated k"]


async def test_polkit_killed_while_it_hangs_is_a_no_at_once(bed, service, nobody, caplog):
    async with Monitor() as seen:
        os.kill(bed.polkitd_pid, signal.SIGSTOP)
        asking = asyncio.ensure_future(nobody.call(*ROTATE, interactive=True))
        await seen.wait_for("CheckAuthorization")
        os.kill(bed.polkitd_pid, signal.SIGKILL)
        await asyncio.to_thread(bed.stop_polkitd)
    try:
        assert await refusal(asking) == NOT_AUTHORIZED
    finally:
        await asyncio.to_thread(bed.start_polkitd)


async def test_a_caller_that_vanishes_while_polkit_hangs_leaves_no_question(bed, service, nobody, caplog):
    async with Monitor() as seen:
        os.kill(bed.polkitd_pid, signal.SIGSTOP)
        try:
            nobody.send(*ROTATE)
            await seen.wait_for("CheckAuthorization")
            await asyncio.to_thread(nobody.close)
            await seen.wait_for("CancelCheckAuthorization")
        finally:
            os.kill(bed.polkitd_pid, signal.SIGCONT)
        assert seen.cancellation("CheckAuthorization") == seen.cancellation("CancelCheckAuthorization")
        assert not service.callers.is_known(seen.sender_of("Rotate"))
    assert service.toy.calls == []
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_user_cannot_fill_a_screen_with_dialogues(bed, service, nobody):
    agent = await asyncio.to_thread(bed.agent, "ignore", nobody.pid, nobody.uid)
    async with Monitor() as seen:
        for number in range(DIALOGUES_PER_USER + 5):
            nobody.send(PATH, INTERFACE, "Rotate", "sa{sv}", [str(number), {}], interactive=True)
        for _ in range(DIALOGUES_PER_USER):
            await asyncio.to_thread(agent.wait_for, "begin")
        await seen.until(lambda _: len(seen.named("LimitsExceeded")) == 5)
        shown = [message for message in seen.messages if message.member == "CheckAuthorization" and message.body[3]]
        assert len(shown) == DIALOGUES_PER_USER
        await asyncio.to_thread(nobody.close)
        await seen.until(lambda _: len(seen.named("CancelCheckAuthorization")) == DIALOGUES_PER_USER)
    assert not service.toy.guard.dialogues._taken
    bed.end(agent.process)


async def test_an_action_that_polkit_does_not_know_is_a_no(bed, caplog):
    bus = await Bus().connect()
    with pytest.raises(NotAuthorized):
        await PolkitAuthority(bus).check(Caller(bus.unique_name, 0), "org.luksrotd1.no-such-verb", {})
    await bus.close()


@pytest.mark.parametrize("reply", [[], [[1, 0, {}]], [[True, False]], ["yes"], [[True, False, {}], 1]])
async def test_an_odd_reply_is_a_no(bed, reply, caplog):
    authority = PolkitAuthority(OddPolkit(reply))
    with pytest.raises(NotAuthorized):
        await authority.check(Caller(":1.1", 0), names.ACTION_LIST, {})


class OddPolkit:
    """Stands for the connection to a polkit that speaks nonsense."""

    def __init__(self, body):
        self.body = body

    async def call(self, message, *, seconds):
        return Message(message_type=MessageType.METHOD_RETURN, reply_serial=1, body=self.body)

    def send(self, message): ...
