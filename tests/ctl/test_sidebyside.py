# SPDX-License-Identifier: GPL-2.0-or-later
"""The same on many volumes: none waits for another."""

import asyncio
import threading

import pytest

from luksrotd import direct
from luksrotd.ctl.sidebyside import AT_ONCE, side_by_side
from luksrotd.errors import FormatError
from luksrotd.host import udev
from luksrotd.ports import DeviceRef


@pytest.mark.asyncio
async def test_one_that_does_not_answer_is_named_and_the_others_are_done(capsys):
    answers, done = asyncio.Event(), []

    async def operate(name):
        if name == "silent":
            await answers.wait()
        done.append(name)
        return f"result of {name}"

    def tell(name, result):
        if len(done) == 2:
            answers.set()
        return [f"{name}: {result}"]

    names = ["one", "silent", "two"]
    async with asyncio.timeout(60):
        found = await side_by_side(names, operate, tell, interrupted=None, silent_seconds=0)
    assert found == [f"result of {name}" for name in names]
    assert done == ["one", "two", "silent"]
    assert capsys.readouterr().err.splitlines() == [
        "luksrotctl: one: result of one",
        "luksrotctl: silent: does not answer",
        "luksrotctl: two: result of two",
    ]


@pytest.mark.asyncio
async def test_nothing_is_told_when_all_answer_in_time(capsys):
    async def operate(name):
        return name.upper()

    assert await side_by_side(["a", "b"], operate, None, interrupted=None) == ["A", "B"]
    assert capsys.readouterr().err == ""


@pytest.mark.asyncio
async def test_a_bug_that_one_meets_keeps_no_other_from_its_end():
    failed, done = asyncio.Event(), []

    async def operate(name):
        if name == "broken":
            failed.set()
            raise KeyError(name)
        await failed.wait()
        await asyncio.sleep(0)
        done.append(name)

    with pytest.raises(KeyError, match="broken"):
        await side_by_side(["one", "broken", "two"], operate, None, interrupted=None)
    assert sorted(done) == ["one", "two"]


@pytest.mark.asyncio
async def test_not_more_at_once_than_a_machine_has_room_for():
    running = most = 0

    async def operate(_):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    await side_by_side([str(number) for number in range(3 * AT_ONCE)], operate, None, interrupted=None)
    assert most == AT_ONCE


@pytest.mark.asyncio
async def test_an_interruption_reaches_all():
    begun, stopped = asyncio.Event(), []

    async def operate(name):
        if name == "b":
            begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.append(name)
            raise

    task = asyncio.create_task(side_by_side(["a", "b"], operate, None, interrupted=None))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stopped == ["a", "b"]


@pytest.mark.asyncio
async def test_who_has_changed_a_volume_when_the_interruption_comes_is_told():
    begun = asyncio.Event()

    async def operate(name):
        if name == "mended":
            begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if name != "mended":
                raise
            await asyncio.sleep(0)
        return f"{name} by now"

    names = ["stopped", "mended"]
    task = asyncio.create_task(side_by_side(names, operate, None, interrupted="stopped"))
    await begun.wait()
    task.cancel()
    assert await task == ["stopped", "mended by now"]


@pytest.mark.asyncio
async def test_what_is_named_twice_is_done_twice():
    async def operate(name):
        return name

    assert await side_by_side(["a", "b", "a"], operate, None, interrupted=None) == ["a", "b", "a"]


@pytest.mark.asyncio
async def test_a_device_that_does_not_say_what_it_holds_keeps_no_other_from_being_found(monkeypatch):
    answers = threading.Event()
    nodes = {"/dev/silent": True, "/dev/luks": True, "/dev/other": False, "/dev/forbidden": None}

    def look(node):
        if node == "/dev/silent":
            answers.wait(60)
        return nodes[node]

    monkeypatch.setattr(direct, "_nodes", lambda: list(nodes))
    monkeypatch.setattr(direct, "_look", look)
    monkeypatch.setattr(udev, "may_hold_luks", lambda _: False)
    # Last, so that many of them do not take the places of those that answer.
    assert await direct.scan_in_time(0.5) == ("/dev/luks", "/dev/silent")
    answers.set()


@pytest.mark.asyncio
async def test_a_machine_without_block_devices(monkeypatch):
    monkeypatch.setattr(direct, "_nodes", list)
    assert await direct.scan_in_time() == ()


UUIDS = {"/dev/sda": "one", "/dev/sdb": "one", "/dev/sdc": "two", "/dev/damaged": None, "/dev/other": None}


@pytest.fixture
def uuids(monkeypatch):
    def uuid_of(ref):
        if ref.path == "/dev/damaged":
            raise FormatError("cannot read it")
        return UUIDS[ref.path]

    monkeypatch.setattr(direct, "uuid_of", uuid_of)


@pytest.mark.asyncio
async def test_two_nodes_of_one_volume_have_their_turns_one_after_the_other(uuids):
    turns, inside, entered = direct.Turns(), set(), asyncio.Event()

    async def work(node):
        async with turns.of(DeviceRef(node)):
            assert UUIDS[node] is None or UUIDS[node] not in inside
            inside.add(UUIDS[node])
            if len(inside) == 3:
                entered.set()
            await entered.wait()
            inside.discard(UUIDS[node])

    async with asyncio.timeout(60):
        await asyncio.gather(*map(work, UUIDS))
