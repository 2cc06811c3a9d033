# SPDX-License-Identifier: GPL-2.0-or-later
"""Gets hold of the secrets that a caller describes (dbus/org.luksrotd1.Device.xml); none is ever read here."""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

from luksrotd import names
from luksrotd.bus.convert import open_keyfile
from luksrotd.bus.guard import Guard, Question
from luksrotd.bus.values import ReceivedFd
from luksrotd.errors import InvalidRequest
from luksrotd.luks2 import layout
from luksrotd.ports import Caller, GenerateInto, SecretFd, SecretSource, TokenSource
from luksrotd.records import dataclass
from luksrotd.service.handover import GeneratedKey, Handover, Secrets
from luksrotd.service.threads import in_thread

#: What needs a right of its own, beside that to the verb: all but what the caller brings along.
ACTIONS: Final = {
    "keyfile": names.ACTION_KEYFILE,
    "credential": names.ACTION_CREDENTIAL,
    "token": names.ACTION_TOKEN,
    "generate": names.ACTION_GENERATE,
}
ANY_TOKEN: Final = -1
_PIN: Final = "pin-fd"


@dataclass(frozen=True, slots=True)
class Description:
    """The one member that describes a secret, its value, and the PIN beside it."""

    member: str
    value: Any
    pin: ReceivedFd | None = None


def description(what: str, described: Mapping[str, Any]) -> Description:
    """What describes ``what``; raises ``InvalidRequest`` if it is not one thing."""
    rest = {member: value for member, value in described.items() if member != _PIN}
    if len(rest) != 1:
        given = ", ".join(sorted(described)) or "none"
        raise InvalidRequest(f"cannot use {what}: it must have exactly one member, and has {given}")
    member, value = next(iter(rest.items()))
    if _PIN in described and member != "token":
        raise InvalidRequest(f"cannot use {what}: a PIN is for a token")
    if member == "generate" and value is not True:
        raise InvalidRequest(f"cannot use {what}: generate can only be true")
    if member == "token" and not ANY_TOKEN <= value < layout.TOKENS_MAX:
        raise InvalidRequest(f"cannot use {what}: the number of the token is out of range")
    return Description(member, value, described.get(_PIN))


class Keyring:
    """Makes ``Secrets`` of descriptions.

    ``new_key`` makes an empty memfd for a generated one.  ``open_credential`` opens a credential of the service by its
    name; it blocks, and raises ``InvalidRequest`` and ``SecretRejected``.
    """

    def __init__(
        self, guard: Guard, new_key: Callable[[], GeneratedKey], open_credential: Callable[[str], int]
    ) -> None:
        self._guard = guard
        self._new_key = new_key
        self._openers = {"keyfile": open_keyfile, "credential": open_credential}

    async def open(
        self, caller: Caller, details: Mapping[str, str], described: Mapping[str, Mapping[str, Any]]
    ) -> Secrets:
        """The secrets, by the same names as ``described``, to be closed by the caller of this.

        Raises ``InvalidRequest``, ``SecretRejected``, and for a kind of secret that the caller has no right to use
        ``NotAuthorized`` or ``InteractiveAuthorizationRequired``.
        """
        wanted = {name: description(f"the secret {name!r}", secret) for name, secret in described.items()}
        kinds = {one.member for one in wanted.values()}
        if rights := [Question(action, details) for kind, action in ACTIONS.items() if kind in kinds]:
            await self._guard.authorize_all(caller, rights)
        with ExitStack() as resources:
            handover: Handover | None = None
            sources: dict[str, SecretSource] = {}
            for name, one in wanted.items():
                if one.member == "generate":
                    handover = self._handover(caller, resources)
                    sources[name] = GenerateInto(handover.fd)
                else:
                    sources[name] = await self._source(one, resources)
            gone = partial(self._guard.callers.gone, caller.name)
            abandoned = partial(handover.abandoned, gone) if handover else None
            return Secrets(sources, resources.pop_all(), handover, abandoned)

    async def _source(self, one: Description, resources: ExitStack) -> SecretSource:
        if one.member == "token":
            pin = None if one.pin is None else _taken(one.pin, resources)
            return TokenSource(None if one.value == ANY_TOKEN else one.value, pin)
        if one.member == "fd":
            return _taken(one.value, resources)
        opener = self._openers[one.member]
        fd = await in_thread(lambda: opener(one.value), about="secrets in files", undo=os.close)
        resources.callback(os.close, fd)
        return SecretFd(fd)

    def _handover(self, caller: Caller, resources: ExitStack) -> Handover:
        handover = Handover(self._new_key(), caller)
        resources.callback(handover.close)
        return handover


def _taken(received: ReceivedFd, resources: ExitStack) -> SecretFd:
    fd = received.take()
    resources.callback(os.close, fd)
    return SecretFd(fd)
