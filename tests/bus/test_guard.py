# SPDX-License-Identifier: GPL-2.0-or-later
"""Several questions to the authority, and how many persons may be asked at once."""

import asyncio
from collections import Counter, defaultdict

import pytest

from luksrotd import names
from luksrotd.bus.caller import CallerVanished
from luksrotd.bus.guard import DIALOGUES_PER_USER, Guard, Question
from luksrotd.errors import InteractiveAuthorizationRequired, NotAuthorized, TooMany
from luksrotd.ports import Caller

pytestmark = pytest.mark.asyncio
ROTATE = Question(names.ACTION_ROTATE, {"device": "/dev/a"})
ROTATE_SYSTEM = Question(names.system_action(names.ACTION_ROTATE), {"device": "/dev/b"})
LIST = Question(names.ACTION_LIST, {})
ONE, TWO = Caller(":1.1", 1000, interactive=True), Caller(":1.2", 1001, interactive=True)


class Polkit:
    """An authority by a table: yes, no, or a dialogue, which lasts until ``answer`` is given."""

    def __init__(self, **answers):
        self.answers = answers
        self.asked = []
        self.dialogues = Counter()
        self.answer = asyncio.Event()

    async def check(self, caller, action, details):
        self.asked.append((action, caller.interactive))
        answer = self.answers[action.rpartition(".")[2].replace("-", "_")]
        if answer == "no":
            raise NotAuthorized("cannot")
        if answer == "dialogue":
            if not caller.interactive:
                raise InteractiveAuthorizationRequired("cannot")
            self.dialogues[caller.uid] += 1
            try:
                await self.answer.wait()
            finally:
                self.dialogues[caller.uid] -= 1


class Present:
    """Callers who stay, until told otherwise."""

    def __init__(self):
        self.vanished = defaultdict(asyncio.Event)

    async def gone(self, name):
        await self.vanished[name].wait()


def guard(polkit, callers=None):
    return Guard(callers or Present(), polkit)


async def settled():
    """Let everything run that can."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_all_must_be_allowed():
    await guard(Polkit(rotate="yes", list="yes")).authorize_all(ONE, [ROTATE, LIST])
    for answers in ({"rotate": "yes", "list": "no"}, {"rotate": "no", "list": "yes"}):
        with pytest.raises(NotAuthorized):
            await guard(Polkit(**answers)).authorize_all(ONE, [ROTATE, LIST])


async def test_nothing_to_ask_is_a_no():
    with pytest.raises(NotAuthorized):
        await guard(Polkit()).authorize_all(ONE, [])


async def test_nobody_is_asked_a_question_where_another_is_refused_anyway():
    polkit = Polkit(rotate="dialogue", rotate_system="no")
    with pytest.raises(NotAuthorized):
        await guard(polkit).authorize_all(ONE, [ROTATE, ROTATE_SYSTEM])
    assert [interactive for _, interactive in polkit.asked] == [False, False]
    with pytest.raises(NotAuthorized):  # rather than that a dialogue would help
        await guard(polkit).authorize_all(Caller(":1.1", 1000), [ROTATE, ROTATE_SYSTEM])


async def test_only_what_needs_a_person_is_put_to_one_and_one_after_the_other():
    polkit = Polkit(rotate="dialogue", rotate_system="dialogue", list="yes")
    asking = asyncio.ensure_future(guard(polkit).authorize_all(ONE, [ROTATE, LIST, ROTATE_SYSTEM]))
    await settled()
    assert polkit.dialogues == {1000: 1}
    polkit.answer.set()
    await asking
    shown = [action for action, interactive in polkit.asked if interactive]
    assert shown == [ROTATE.action, ROTATE_SYSTEM.action]


async def test_a_user_has_few_dialogues_at_a_time_whatever_the_number_of_calls():
    polkit = Polkit(rotate="dialogue", list="yes")
    door = guard(polkit)
    asking = [asyncio.ensure_future(door.authorize_all(ONE, [ROTATE])) for _ in range(DIALOGUES_PER_USER + 3)]
    await settled()
    assert polkit.dialogues == {1000: DIALOGUES_PER_USER}
    refused = [task for task in asking if task.done()]
    assert [type(task.exception()) for task in refused] == [TooMany] * 3
    other = asyncio.ensure_future(door.authorize_all(TWO, [ROTATE]))
    await door.authorize_all(ONE, [LIST])  # what needs no person goes on
    await settled()
    assert polkit.dialogues == {1000: DIALOGUES_PER_USER, 1001: 1}
    polkit.answer.set()
    await asyncio.gather(other, *(task for task in asking if task not in refused))
    await door.authorize_all(ONE, [ROTATE])
    assert not door.dialogues._taken


async def test_dialogues_end_with_their_callers():
    polkit, callers = Polkit(rotate="dialogue"), Present()
    door = guard(polkit, callers)
    asking = [asyncio.ensure_future(door.authorize_all(ONE, [ROTATE])) for _ in range(DIALOGUES_PER_USER)]
    await settled()
    callers.vanished[ONE.name].set()
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {CallerVanished}
    assert not door.dialogues._taken
    assert polkit.dialogues == {1000: 0}
