# SPDX-License-Identifier: GPL-2.0-or-later
"""The secrets of a job, and how a generated one gets to its owner before the old one dies."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final, Protocol

from luksrotd.errors import Cancelled, InvalidRequest, NotAuthorized
from luksrotd.ports import Caller, SecretSource

TAKE_SECONDS: Final = 60.0
"""How long a verified key waits to be taken; the worker and its memory wait with it."""


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
    """Gives a generated key, once, to the connection that started the job.

    ``present`` asks the bus whether the owner is still there.  The bus answers in order, so if it says yes after the
    key was sent, the owner's connection has the key.
    """

    def __init__(
        self, key: GeneratedKey, owner: Caller, *, present: Callable[[], Awaitable[bool]], seconds: float = TAKE_SECONDS
    ) -> None:
        self._key = key
        self._owner = owner
        self._present = present
        self._seconds = seconds
        self._offered = asyncio.Event()
        self._sent = asyncio.Event()
        self._taken = False
        self._closed = False

    @property
    def fd(self) -> int:
        """What the key is to be generated into."""
        return self._key.fd

    @property
    def taken(self) -> bool:
        """Whether the owner has asked for it and got it."""
        return self._taken

    async def deliver(self) -> None:
        """Offer the key, and return when the owner has it (a ``Deliver``); raises ``Cancelled`` if that fails."""
        self._key.seal()
        self._offered.set()
        try:
            async with asyncio.timeout(self._seconds):
                await self._sent.wait()
                present = await self._present()
        except TimeoutError as error:
            raise Cancelled(f"cannot go on: the generated key was not taken within {self._seconds:g} s") from error
        if not present:
            raise Cancelled("cannot go on: its caller is gone, and the generated key with it")

    async def take(self, caller: Caller) -> int:
        """A descriptor of the key, as soon as it is verified; to be followed by ``sent`` once it is on its way.

        Raises ``NotAuthorized`` for anybody but the owner's connection, ``InvalidRequest`` the second time, and
        ``Cancelled`` when the job ends before.
        """
        if caller.name != self._owner.name:
            raise NotAuthorized("cannot hand over the key: another connection has started the job")
        await self._offered.wait()
        if self._taken:
            raise InvalidRequest("cannot hand over the key: it has been taken")
        if self._closed:
            raise Cancelled("cannot hand over the key: the job has ended")
        descriptor = self._key.reader()
        self._taken = True
        return descriptor

    def sent(self) -> None:
        """The reply with the key has been queued."""
        self._sent.set()

    async def abandoned(self, gone: Callable[[], Awaitable[None]]) -> None:
        """Return when the owner has ``gone`` without the key; never once it was taken."""
        await gone()
        if self._taken:
            await asyncio.get_running_loop().create_future()

    def close(self) -> None:
        """Let go of the key; who still waits for it gets nothing."""
        self._closed = True
        self._offered.set()
        self._key.close()


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
