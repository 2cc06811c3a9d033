# SPDX-License-Identifier: GPL-2.0-or-later
"""Asks the authority about a caller, for as long as the caller is there."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from luksrotd.bus.caller import Callers, CallerVanished
from luksrotd.ports import Authority, Caller

DETAIL_LIMIT: Final = 200
"""Characters of a detail that polkit gets to show."""


@dataclass(frozen=True, slots=True)
class Guard:
    """What every exported interface needs to answer a call."""

    callers: Callers
    authority: Authority

    async def authorize(self, caller: Caller, action: str, details: Mapping[str, str]) -> None:
        """Return if the caller may; withdraw the question should the caller vanish meanwhile.

        Raises ``NotAuthorized``, ``InteractiveAuthorizationRequired`` or ``CallerVanished``.
        """
        shown = {key: _printable(value) for key, value in details.items()}
        check = asyncio.ensure_future(self.authority.check(caller, action, shown))
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
