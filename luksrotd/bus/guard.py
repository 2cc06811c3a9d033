# SPDX-License-Identifier: GPL-2.0-or-later
"""Asks the authority about a caller, for as long as the caller is there.

A question is asked without interaction first: most are answered then, and a person is troubled only where nothing else
says no, and where not too many dialogues of the same user wait already (docs/adr/0017-polkit-actions.md).
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Final

from luksrotd.bus.caller import Callers, CallerVanished
from luksrotd.bus.quota import Quota
from luksrotd.errors import InteractiveAuthorizationRequired, NotAuthorized
from luksrotd.ports import Authority, Caller
from luksrotd.records import dataclass

DETAIL_LIMIT: Final = 200
"""Characters of a detail that polkit gets to show."""
DIALOGUES_PER_USER: Final = 4
"""Questions to persons that one user's calls may have open; each may be a dialogue on somebody's screen."""


@dataclass(frozen=True, slots=True)
class Question:
    """A polkit action, and the details for the agent's text and for rules; no secrets."""

    action: str
    details: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Guard:
    """What every exported interface needs to answer a call."""

    callers: Callers
    authority: Authority
    calls: Quota = field(default_factory=Quota)
    dialogues: Quota = field(default_factory=lambda: Quota(DIALOGUES_PER_USER, "calls of the user wait for a person"))

    async def authorize(self, caller: Caller, action: str, details: Mapping[str, str]) -> None:
        """``authorize_all`` for one question."""
        await self.authorize_all(caller, [Question(action, details)])

    async def authorize_all(self, caller: Caller, questions: Sequence[Question]) -> None:
        """Return if the caller may do all of it; withdraw the question should the caller vanish meanwhile.

        Nobody authenticates in vain: what is refused anyway is refused before.  Raises ``NotAuthorized`` (for no
        questions, too), ``InteractiveAuthorizationRequired``, ``TooMany`` or ``CallerVanished``.
        """
        if not questions:
            raise NotAuthorized("cannot authorize: there is nothing to ask about")
        open_questions: list[Question] = []
        reason: InteractiveAuthorizationRequired | None = None
        for question in questions:
            try:
                await self._ask(replace(caller, interactive=False), question)
            except InteractiveAuthorizationRequired as error:
                open_questions.append(question)
                reason = error
        if reason and not caller.interactive:
            raise reason
        for question in open_questions:
            with self.dialogues.one_of(caller.uid):
                await self._ask(caller, question)

    async def _ask(self, caller: Caller, question: Question) -> None:
        shown = {key: _printable(value) for key, value in question.details.items()}
        check = asyncio.ensure_future(self.authority.check(caller, question.action, shown))
        gone = asyncio.ensure_future(self.callers.gone(caller.name))
        try:
            await asyncio.wait({check, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise CallerVanished(caller.name)
            check.result()
        finally:
            check.cancel()
            gone.cancel()
            await asyncio.gather(check, gone, return_exceptions=True)


def _printable(value: str) -> str:
    """A detail fit for an authentication dialogue: a device's label is under the control of whoever plugs it in."""
    return "".join(letter if letter.isprintable() else "?" for letter in value[:DETAIL_LIMIT])
