# SPDX-License-Identifier: GPL-2.0-or-later
"""Records who was refused what, without letting anybody fill the journal with it."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final

from luksrotd.errors import NotAuthorized
from luksrotd.ports import Authority, Caller, Clock
from luksrotd.service.audit import Audit

#: In this time a user's refusals of one action make one entry: journald, where it is flooded, drops other entries too.
QUIET: Final = timedelta(seconds=60)
#: Users and actions that are remembered; the oldest is forgotten for a new one.
REMEMBERED: Final = 1024


class RecordedAuthority:
    """An ``Authority`` whose refusals are recorded."""

    def __init__(self, authority: Authority, audit: Audit, clock: Clock) -> None:
        self._authority = authority
        self._audit = audit
        self._clock = clock
        self._quiet: dict[tuple[int, str], _Quiet] = {}

    async def check(self, caller: Caller, action: str, details: Mapping[str, str]) -> None:
        """See ``ports.Authority.check``; a question back (``InteractiveAuthorizationRequired``) is no refusal."""
        try:
            await self._authority.check(caller, action, details)
        except NotAuthorized:
            self._refused(caller, action, details)
            raise

    def _refused(self, caller: Caller, action: str, details: Mapping[str, str]) -> None:
        now = self._clock.now()
        quiet = self._quiet.get((caller.uid, action))
        if quiet is not None and quiet.since <= now < quiet.since + QUIET:
            quiet.unrecorded += 1
            return
        self._quiet.pop((caller.uid, action), None)
        if len(self._quiet) >= REMEMBERED:
            self._quiet.pop(next(iter(self._quiet)))
        self._quiet[caller.uid, action] = _Quiet(now)
        about = {name: details.get(name) for name in ("uuid", "key", "operation")}
        self._audit.denied(
            caller, action, {**about, "node": details.get("device")}, quiet.unrecorded if quiet is not None else 0
        )


class _Quiet:
    def __init__(self, since: datetime) -> None:
        self.since = since
        self.unrecorded = 0
