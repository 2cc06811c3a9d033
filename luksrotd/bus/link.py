# SPDX-License-Identifier: GPL-2.0-or-later
"""The service on one connection to the system bus, and on the next one when that has ended.

Volumes and jobs outlive a connection; objects, callers and questions to polkit end with it.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Final, Self

from luksrotd.bus import service
from luksrotd.bus.authority import PolkitAuthority
from luksrotd.bus.caller import Callers, Identify
from luksrotd.bus.connection import Bus
from luksrotd.bus.guard import Guard
from luksrotd.bus.publisher import Publisher
from luksrotd.bus.secrets import Keyring
from luksrotd.bus.served import Served
from luksrotd.ports import Authority, Caller
from luksrotd.records import dataclass
from luksrotd.service.handover import GeneratedKey

log = logging.getLogger(__name__)

FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 5.0
"""Between two attempts to connect, in seconds."""


@dataclass(frozen=True, slots=True)
class Outfit:
    """What a link works with beside the bus.

    ``identify`` says who a process is, ``recorded`` puts a record of what it refuses around an authority, ``new_key``
    makes an empty memfd for a generated key, ``open_credential`` opens a credential of the service by its name.
    """

    identify: Identify
    recorded: Callable[[Authority], Authority]
    new_key: Callable[[], GeneratedKey]
    open_credential: Callable[[str], int]


class Link:
    """One connection, the objects on it, and its callers."""

    def __init__(self, bus: Bus, number: int, outfit: Outfit, served: Served) -> None:
        self.bus = bus
        self.number = number
        self.callers = Callers(bus, outfit.identify, connection=number)
        guard = Guard(self.callers, outfit.recorded(PolkitAuthority(bus)))
        self._publisher = Publisher(bus, guard, Keyring(guard, outfit.new_key, outfit.open_credential), served)

    @classmethod
    async def open(cls, number: int, outfit: Outfit, served: Served) -> Self:
        """Connect and export everything; raises ``ConnectionError``."""
        bus = await service.connect()
        try:
            link = cls(bus, number, outfit, served)
            await service.watch(link.callers)
        except BaseException:
            await bus.close()
            raise
        link._publisher.publish()
        return link

    async def own_name(self) -> None:
        """Become reachable; raises ``ConnectionError``."""
        await service.own_name(self.bus)

    async def lost(self) -> None:
        """Return when the connection has ended; all its callers are gone then."""
        await service.lost(self.bus)
        self.callers.lost()

    async def close(self) -> None:
        """Answer what is being answered, and end it.  Jobs go on."""
        self._publisher.withdraw()
        await self.bus.close()
        self.callers.lost()
        self.bus.unexport_all()


class Links:
    """One ``Link`` after the other; ``bus`` is that of the present one, None while there is none."""

    def __init__(self, outfit: Outfit) -> None:
        self._outfit = outfit
        self._link: Link | None = None
        self._made = 0
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def bus(self) -> Bus | None:
        """The connection on which the service is reachable."""
        return self._link.bus if self._link else None

    async def gone(self, caller: Caller) -> None:
        """Return when the caller has left the bus, or the connection that it was on has ended."""
        if self._link is not None and self._link.number == caller.connection:
            await self._link.callers.gone(caller.name)

    async def open(self, served: Served) -> None:
        """The first connection, not reachable yet; raises ``ConnectionError``."""
        self._made += 1
        self._link = await Link.open(self._made, self._outfit, served)

    async def own_name(self) -> None:
        """Become reachable; raises ``ConnectionError``."""
        if self._link is None:
            raise ConnectionError("not connected to the bus")
        await self._link.own_name()

    async def lost(self) -> None:
        """Return when the connection has ended, and let go of it."""
        if self._link is not None:
            await self._link.lost()
            self._drop()

    async def reopen(self, served: Served) -> None:
        """Try to become reachable again until that succeeds, without haste."""
        said = ""
        for pause in _pauses():
            try:
                await self.open(served)
                await self.own_name()
            except ConnectionError as error:
                self._drop()
                if str(error) != said:
                    said = str(error)
                    log.warning("cannot serve now: %s", said)
                await asyncio.sleep(pause)
            else:
                return

    async def close(self) -> None:
        """End the connection."""
        self._drop()
        if self._closing:
            await asyncio.wait(self._closing.copy())

    def _drop(self) -> None:
        """Close what there is, in a task: a call that hangs on a dying disk must not keep others from the next one."""
        if self._link is not None:
            task = asyncio.create_task(self._link.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            self._link = None


def _pauses() -> Iterator[float]:
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE)
