# SPDX-License-Identifier: GPL-2.0-or-later
"""Gets hold of the secrets that a caller describes."""

import asyncio
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from luksrotd import names
from luksrotd.bus.convert import open_keyfile, the_member
from luksrotd.bus.guard import Guard
from luksrotd.ports import Caller, GenerateInto, SecretFd, SecretSource
from luksrotd.service.handover import GeneratedKey, Handover, Secrets


class Keyring:
    """Makes ``Secrets`` of descriptions; ``new_key`` makes an empty memfd for a generated one."""

    def __init__(self, guard: Guard, new_key: Callable[[], GeneratedKey]) -> None:
        self._guard = guard
        self._new_key = new_key

    async def open(
        self, caller: Caller, details: Mapping[str, str], described: Mapping[str, Mapping[str, Any]]
    ) -> Secrets:
        """The secrets, by the same names as ``described``, to be closed by the caller of this.

        Raises ``InvalidRequest``, ``SecretRejected``, and for a key file without the right to use one ``NotAuthorized``
        or ``InteractiveAuthorizationRequired``.
        """
        members = {name: the_member(f"the secret {name!r}", secret) for name, secret in described.items()}
        if any(member == "keyfile" for member, _ in members.values()):
            await self._guard.authorize(caller, names.ACTION_KEYFILE, details)
        with ExitStack() as resources:
            handover: Handover | None = None
            sources: dict[str, SecretSource] = {}
            for name, (member, value) in members.items():
                if member == "generate":
                    handover = self._handover(caller, resources)
                    sources[name] = GenerateInto(handover.fd)
                    continue
                fd = value.take() if member == "fd" else await asyncio.to_thread(open_keyfile, value)
                resources.callback(os.close, fd)
                sources[name] = SecretFd(fd)
            gone = partial(self._guard.callers.gone, caller.name)
            abandoned = partial(handover.abandoned, gone) if handover else None
            return Secrets(sources, resources.pop_all(), handover, abandoned)

    def _handover(self, caller: Caller, resources: ExitStack) -> Handover:
        handover = Handover(self._new_key(), caller)
        resources.callback(handover.close)
        return handover
