# SPDX-License-Identifier: GPL-2.0-or-later
"""The secrets of a job, and how a generated one gets to its owner before the old one dies."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import field
from typing import Final, Protocol

from luksrotd.errors import Cancelled, InvalidRequest, NotAuthorized
from luksrotd.ports import Caller, SecretSource
from luksrotd.records import dataclass

CONFIRM_SECONDS: Final = 300.0
"""How long a verified key waits to be confirmed; the worker, its memory and the volume's job lock wait with it."""


class GeneratedKey(Protocol):
    """A memfd that the worker writes a new key into."""

    @property
    def fd(self) -> int:
        """The memfd."""

    def seal(self) -> None:
        """Make it immutable."""

    def reader(self) -> int:
        """A new read-only descriptor."""

    def close(self) -> None:
        """Let go of it; idempotent."""


class Handover:
    """Gives a generated key to the connection that started the job, and waits until its owner says that it is safe.

    That a reply was sent proves nothing: the bus may refuse to pass it on, the owner may die before it has stored the
    key.  So nothing is committed before ``confirm``.
    """

    def __init__(self, key: GeneratedKey, owner: Caller, *, seconds: float = CONFIRM_SECONDS) -> None:
        self._key = key
        self._owner = owner
        self._seconds = seconds
        self._offered = asyncio.Event()
        self._confirmed = asyncio.Event()
        self._taken = False
        self._closed = False

    @property
    def fd(self) -> int:
        """What the key is to be generated into."""
        return self._key.fd

    async def deliver(self) -> None:
        """Offer the key, and return when the owner has it safe (a ``Deliver``); raises ``Cancelled`` if that fails."""
        self._key.seal()
        self._offered.set()
        try:
            async with asyncio.timeout(self._seconds):
                await self._confirmed.wait()
        except TimeoutError as error:
            raise Cancelled(f"cannot go on: the generated key was not confirmed within {self._seconds:g} s") from error

    async def take(self, caller: Caller) -> int:
        """A descriptor of the key, as soon as it is verified.

        Raises ``NotAuthorized`` for anybody but the owner's connection, and ``Cancelled`` when the job ends before.
        """
        self._check_owner(caller)
        await self._offered.wait()
        if self._closed:
            raise Cancelled("cannot hand over the key: the job has ended")
        self._taken = True
        return self._key.reader()

    def confirm(self, caller: Caller) -> None:
        """The owner has stored the key: the old one may die.

        Raises ``NotAuthorized`` for anybody but the owner's connection, ``InvalidRequest`` if it never took the key.
        """
        self._check_owner(caller)
        if not self._taken:
            raise InvalidRequest("cannot confirm the key: it has not been taken")
        self._confirmed.set()

    async def abandoned(self, gone: Callable[[], Awaitable[None]]) -> None:
        """Return when the owner has ``gone`` without confirming; never once it has."""
        await gone()
        if self._confirmed.is_set():
            await asyncio.get_running_loop().create_future()

    def close(self) -> None:
        """Let go of the key; who still waits for it gets nothing."""
        self._closed = True
        self._offered.set()
        self._key.close()

    def _check_owner(self, caller: Caller) -> None:
        if not caller.is_same(self._owner):
            raise NotAuthorized("cannot hand over the key: another connection has started the job")


@dataclass(frozen=True, slots=True)
class Secrets:
    """The secrets of a job by their names in ``rotation.edits``; ``resources`` holds their descriptors.

    ``abandoned`` returns when nobody will ever take the generated key.
    """

    sources: Mapping[str, SecretSource] = field(default_factory=dict)
    resources: ExitStack = field(default_factory=ExitStack)
    handover: Handover | None = None
    abandoned: Callable[[], Awaitable[None]] | None = None

    async def deliver(self) -> None:
        """What a transaction awaits before it commits."""
        if self.handover is not None:
            await self.handover.deliver()

    def close(self) -> None:
        """Close every descriptor; idempotent."""
        self.resources.close()
