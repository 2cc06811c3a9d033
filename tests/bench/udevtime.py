# SPDX-License-Identifier: GPL-2.0-or-later
"""11: how soon a volume that comes is on the bus, beside what udev itself takes for it."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import pyudev
from dbus_next.message import Message

from tests.bench import real
from tests.bench.figures import Finding, Result, Series
from tests.bench.stage import stage
from tests.support.busclient import BusClient
from tests.support.daemon_process import WAIT_SECONDS, Disk
from tests.support.kernel import LoopDevice

#: Volumes that are there all the time, and that come together; in one round of RARE some come together.
OTHERS: Final = 50
TOGETHER: Final = 16
RARE: Final = 10
LIMIT_SECONDS: Final = 0.05
UDEV: Final = "the kernel's event to udev's event"
OBJECT: Final = "udev's event to the object on the bus"
BURST: Final = f"the same, {TOGETHER} at once"
METHOD: Final = f"""{OTHERS} volumes are there, and the daemon is idle, when one more is attached to a loop device.
The clock is read when the kernel's event of that comes, when udev's event comes, which says what is on the device (it
is sent when all rules have been run, so the device has been probed), and when InterfacesAdded of the volume comes. One
process receives all three, by netlink and by the bus. The node of a loop device is older than the volume on it, so
that the event is mostly not "add" but "change"; luksrotd does not mind. At once: {TOGETHER} volumes, attached one right
after the other; the figure is of each of them, from its own event of udev."""


class Watch:
    """When what has come; times by sequence number of the event, LUKS UUID and object path."""

    def __init__(self, client: BusClient) -> None:
        self.kernel: dict[int, float] = {}
        self.udev: dict[str, tuple[int, float]] = {}
        self.objects: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._monitors: list[tuple[Any, Callable[[Any, float], None]]] = []
        client.bus.remove_message_handler(client._on_message)  # its signals would pile up
        client.bus.add_message_handler(self._on_message)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def took(self, disk: Disk) -> tuple[float, float]:
        """Seconds that udev took for a volume that has come, and those from then until it was on the bus."""
        number, processed = self.udev[disk.uuid]
        return processed - self.kernel[number], self.objects[disk.path] - processed

    @contextmanager
    def listening(self) -> Iterator[None]:
        """To the kernel and to udev."""
        loop = asyncio.get_running_loop()
        for source, note in (("kernel", self._on_kernel), ("udev", self._on_udev)):
            monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source)
            monitor.filter_by("block")
            monitor.start()
            loop.add_reader(monitor.fileno(), self._receive)
            self._monitors.append((monitor, note))
        yield
        for monitor, _ in self._monitors:
            loop.remove_reader(monitor.fileno())

    def _receive(self) -> None:
        """All events that are there."""
        now = time.perf_counter()
        for monitor, note in self._monitors:
            while (device := monitor.poll(timeout=0)) is not None:
                note(device, now)
        self._changed.set()

    def _on_kernel(self, device: Any, now: float) -> None:
        self.kernel[device.sequence_number] = now

    def _on_udev(self, device: Any, now: float) -> None:
        """It has the number of the kernel's."""
        self.udev.setdefault(device.properties.get("ID_FS_UUID", ""), (device.sequence_number, now))

    def _on_message(self, message: Message) -> bool:
        self._receive()  # what came before the message
        now = time.perf_counter()
        if message.member == "InterfacesAdded":
            self.objects.setdefault(message.body[0], now)
        elif message.member == "InterfacesRemoved":
            self.objects.pop(message.body[0], None)
        return False


async def _come_and_go(watch: Watch, number: int) -> list[tuple[float, float]]:
    """So many volumes at once; what ``took`` says of each."""
    with ExitStack() as stack:
        images = [real.image(f"udev-{one}") for one in range(number)]
        for image in images:
            stack.callback(image.unlink)
        # The event loop goes on meanwhile, to receive what is told.
        loops = await asyncio.to_thread(lambda: [stack.enter_context(LoopDevice(image)) for image in images])
        disks = [Disk(loop) for loop in loops]
        paths = {disk.path for disk in disks}
        await watch.until(lambda: paths <= watch.objects.keys())
        await watch.until(lambda: {disk.uuid for disk in disks} <= watch.udev.keys())
        times = [watch.took(disk) for disk in disks]
    await watch.until(lambda: not paths & watch.objects.keys())
    return times


async def events(rounds: int) -> Result:
    """11."""
    alone, together = [], []
    async with stage(daemon=False) as place:
        real.volumes(place, OTHERS, "others")
        watch = Watch(place.client)
        async with real.daemon(place.bed):
            with watch.listening():
                await _come_and_go(watch, 1)  # it does not count
                for number in range(rounds):
                    alone += await _come_and_go(watch, 1)
                    if number % RARE == 0:
                        together += await _come_and_go(watch, TOGETHER)
    return _result(alone, [ours for _, ours in together])


def _result(alone: Sequence[tuple[float, float]], together: Sequence[float]) -> Result:
    series = [
        Series(name, "s", tuple(values))
        for name, values in zip((UDEV, OBJECT, BURST), (*zip(*alone, strict=True), together), strict=True)
    ]
    udev, ours, _ = series
    spread = [
        Series(f"{one.name}, p{percent}", "s", (one.percentile(percent),)) for one in series for percent in (50, 99)
    ]
    finding = Finding(f"p50 from {OBJECT}", ours.percentile(50), LIMIT_SECONDS, "s")
    return Result(11, "From udev to the bus", METHOD, [*series, *spread], [ours.over(udev)], [finding])
