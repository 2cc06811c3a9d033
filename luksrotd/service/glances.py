# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes that are in order, as nearly all are nearly always, recognised at little cost.

To hand a volume to a thread takes nearly as long as to look at it, and to start a probe much longer.  So one thread
looks at all volumes that are asked about, one after the other, and one probe at those that are in order so far.  No
lock is taken, and nothing is written.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Final

from luksrotd.errors import FormatError
from luksrotd.ports import DeviceRef, HeaderDevice, Host
from luksrotd.rotation import reconcile
from luksrotd.rotation.leftovers import Rules
from luksrotd.rotation.view import DeviceView
from luksrotd.service.cancellation import to_the_end
from luksrotd.service.snapshot import no_areas, read_snapshot
from luksrotd.service.suspects import Suspects
from luksrotd.service.threads import in_thread

log = logging.getLogger(__name__)

TOGETHER: Final = 32
"""Volumes for one thread and one probe at a time, so many devices are open."""
PATIENCE: Final = 0.5
"""Seconds, then another thread goes on with the other volumes: a device that has died does not answer for long."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A volume that somebody asks about; ``given_up``: who asked has gone, and it need not be looked at."""

    ref: DeviceRef
    rules: Rules
    answer: "asyncio.Future[DeviceView | None]"
    given_up: bool = False

    def settle(self, answer: DeviceView | BaseException | None) -> None:
        """Tell."""
        if self.answer.done():
            return
        if isinstance(answer, BaseException):
            self.answer.set_exception(answer)
        else:
            self.answer.set_result(answer)


#: The open device and the volume on it, if it is in order so far, else the answer.
_Looked = tuple[HeaderDevice, DeviceView] | Exception | None


class Glances:
    """Looks at volumes with the ports of ``host``; ``patience`` in seconds."""

    def __init__(self, host: Host, suspects: Suspects, *, patience: float = PATIENCE) -> None:
        self._host = host
        self._suspects = suspects
        self._patience = patience
        self._asked: deque[_Asked] = deque()
        self._paths: set[str] = set()
        #: Whose thread takes those who ask; one that does not come back is replaced, and waits beside it.
        self._at_work: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def clean(self, ref: DeviceRef, rules: Rules) -> DeviceView | None:
        """The volume, if nothing is to be said of it, mended or kept; ``None`` if there is, or in doubt.

        Two copies that are valid and say the same are no half of a write: who writes just now has not begun, or has
        ended.  Raises ``UnknownDevice``, ``NotLuks2`` and ``DeviceError``.
        """
        if ref.metadata_path in self._paths:
            return None  # were it dead, each who asks would take another thread
        asked = _Asked(ref, rules, asyncio.get_running_loop().create_future())
        self._paths.add(ref.metadata_path)
        self._asked.append(asked)
        self._go_on()
        try:
            return await asyncio.shield(asked.answer)
        except asyncio.CancelledError:
            asked.given_up = True
            await to_the_end(_ended(asked.answer))
            raise
        finally:
            self._paths.discard(ref.metadata_path)

    def _go_on(self) -> None:
        if self._at_work is None and self._asked:
            self._at_work = asyncio.create_task(self._work())
            self._tasks.add(self._at_work)
            self._at_work.add_done_callback(self._tasks.discard)

    async def _work(self) -> None:
        found: deque[tuple[_Asked, _Looked]] = deque()
        looking = asyncio.ensure_future(in_thread(partial(self._look_at_some, found)))
        try:
            while found or not looking.done():
                await asyncio.wait({looking}, timeout=self._patience)
                if looking.done() and looking.exception() is not None:
                    found.extend((asked, None) for asked in self._all_asked())  # no thread is to be had
                if self._at_work is asyncio.current_task():
                    self._at_work = None
                    self._go_on()
                await self._conclude([found.popleft() for _ in range(len(found))])
        except asyncio.CancelledError:  # the event loop ends
            await to_the_end(_ended(looking))
            for asked, looked in (*found, *((asked, None) for asked in self._all_asked())):
                _close(looked)
                asked.settle(None)
            raise

    def _look_at_some(self, found: deque[tuple[_Asked, _Looked]]) -> None:
        """In a thread; each is found at once, for the next one may not answer."""
        for asked in islice(self._all_asked(), TOGETHER):
            try:
                looked = None if asked.given_up else self._look(asked)
            except Exception as error:  # noqa: BLE001 - whoever has asked is told, and the others go on
                looked = error
            found.append((asked, looked))

    def _all_asked(self) -> Iterator[_Asked]:
        """Takes them one by one: other threads may do so, too."""
        with suppress(IndexError):
            while True:
                yield self._asked.popleft()

    def _look(self, asked: _Asked) -> _Looked:
        device = self._host.devices.open(asked.ref)
        try:
            seen = read_snapshot(asked.ref, device, no_areas).view
            if not reconcile.diagnose(seen, (), asked.rules) and self._suspects.settled(seen):
                return device, seen
        except FormatError:
            pass  # it may be half a write
        except BaseException:
            device.close()
            raise
        device.close()
        return None

    async def _conclude(self, found: Sequence[tuple[_Asked, _Looked]]) -> None:
        """Probe those that are in order so far, all at once, and answer."""
        devices = [looked[0] for _, looked in found if isinstance(looked, tuple)]
        clear = False
        try:
            clear = not devices or await self._host.probe.all_clear(devices)
        except Exception:  # the thorough way meets it again
            log.exception("cannot look for signatures")
        finally:
            for asked, looked in found:
                _close(looked)
                if isinstance(looked, tuple):
                    asked.settle(looked[1] if clear else None)
                else:
                    asked.settle(looked)


def _close(looked: _Looked) -> None:
    if isinstance(looked, tuple):
        looked[0].close()


async def _ended(future: "asyncio.Future[Any]") -> None:
    await asyncio.wait({future})
    if not future.cancelled():
        future.exception()  # nobody is left to be told
