# SPDX-License-Identifier: GPL-2.0-or-later
"""polkit as the ``Authority`` (polkit reference manual, ``org.freedesktop.PolicyKit1.Authority``).  Fails closed."""

import asyncio
import itertools
import logging
from collections.abc import Mapping
from typing import Any, Final, Protocol

from dbus_next.constants import MessageFlag
from dbus_next.errors import DBusError
from dbus_next.message import Message
from dbus_next.signature import Variant

from luksrotd.bus.values import body_of
from luksrotd.errors import InteractiveAuthorizationRequired, NotAuthorized
from luksrotd.ports import Caller

log = logging.getLogger(__name__)

POLKIT: Final = "org.freedesktop.PolicyKit1"
AUTHORITY_PATH: Final = "/org/freedesktop/PolicyKit1/Authority"
AUTHORITY: Final = "org.freedesktop.PolicyKit1.Authority"
ALLOW_USER_INTERACTION: Final = 1
DISMISSED: Final = "polkit.dismissed"
PERSON_SECONDS: Final = 300.0
"""How long a person may take to authenticate."""
POLKIT_SECONDS: Final = 25.0
"""How long polkit may take without one."""
QUESTIONS_AT_ONCE: Final = 64
DIALOGUES_AT_ONCE: Final = 48
"""More wait: the bus lets a connection wait for 128 replies only (``max_replies_per_connection``) and refuses the rest;
what cannot be asked is not authorized."""


class Connection(Protocol):
    """What is needed of ``Bus``."""

    async def call(self, msg: Message, *, seconds: float | None) -> Message | None:
        """Call and wait for the reply."""

    def send(self, msg: Message) -> object:
        """Queue a message."""


class PolkitAuthority:
    """Asks polkit about the owner of a unique bus name, which cannot be recycled as a process id can."""

    def __init__(
        self, bus: Connection, *, person_seconds: float = PERSON_SECONDS, polkit_seconds: float = POLKIT_SECONDS
    ) -> None:
        self._bus = bus
        self._seconds = {True: person_seconds, False: polkit_seconds}
        self._questions = itertools.count(1)
        self._places = {True: asyncio.Semaphore(DIALOGUES_AT_ONCE), False: asyncio.Semaphore(QUESTIONS_AT_ONCE)}

    async def check(self, caller: Caller, action: str, details: Mapping[str, str]) -> None:
        """See ``ports.Authority.check``."""
        async with self._places[caller.interactive]:
            await self._ask(caller, action, details)

    async def _ask(self, caller: Caller, action: str, details: Mapping[str, str]) -> None:
        cancellation = f"luksrotd-{next(self._questions)}"
        subject = ["system-bus-name", {"name": Variant("s", caller.name)}]
        flags = ALLOW_USER_INTERACTION if caller.interactive else 0
        body = [subject, action, dict(details), flags, cancellation]
        try:
            reply = await self._bus.call(
                _message("CheckAuthorization", "(sa{sv})sa{ss}us", body), seconds=self._seconds[caller.interactive]
            )
            is_authorized, is_challenge, result = _parse(body_of(reply))
        except (asyncio.CancelledError, TimeoutError) as error:
            # polkit would go on asking the person, for a caller who has gone
            self._bus.send(_message("CancelCheckAuthorization", "s", [cancellation], MessageFlag.NO_REPLY_EXPECTED))
            if isinstance(error, asyncio.CancelledError):
                raise
            raise NotAuthorized(f"cannot authorize {action}: polkit did not answer in time") from None
        except (DBusError, OSError, ValueError) as error:
            log.warning("cannot ask polkit about %s: %s", action, error)
            raise NotAuthorized(f"cannot authorize {action}: polkit cannot be asked") from None
        if is_authorized:
            return
        if is_challenge and not caller.interactive:
            raise InteractiveAuthorizationRequired(f"cannot authorize {action} without interaction")
        why = "the authentication was dismissed" if result.get(DISMISSED) else "not allowed by polkit"
        raise NotAuthorized(f"cannot authorize {action}: {why}")


def _message(member: str, signature: str, body: list[Any], flags: MessageFlag = MessageFlag.NONE) -> Message:
    return Message(
        destination=POLKIT,
        path=AUTHORITY_PATH,
        interface=AUTHORITY,
        member=member,
        signature=signature,
        body=body,
        flags=flags,
    )


def _parse(body: list[Any]) -> tuple[bool, bool, dict[str, str]]:
    """The AuthorizationResult ``(bba{ss})``; raises ``ValueError`` for anything else."""
    match body:
        case [[bool() as is_authorized, bool() as is_challenge, dict() as details]]:
            return is_authorized, is_challenge, details
        case _:
            raise ValueError("an odd reply")
