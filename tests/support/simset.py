# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated host with several volumes that share a backup key."""

import functools
from collections.abc import Sequence
from typing import Any

from luksrotd.luks2.pair import HeaderCopy, parse_pair
from luksrotd.ports import DeviceIdentity, DeviceRef, Host
from luksrotd.service.sets import VolumeSets
from luksrotd.service.setwork import SetRequest, SetResult
from luksrotd.service.volume import Volumes
from tests.support import forge
from tests.support.simdisk import SimDevices, SimDisk
from tests.support.simengine import UUID, SimEngine, make_volume, opened_by
from tests.support.simhost import SimClock, SimEntropy, SimJournal, SimProbe
from tests.support.simlocks import SimLocks
from tests.support.simshadow import SimShadows
from tests.support.simulation import CHEAP, MAIN, NEW, OLD, Simulation, run, secrets

SIZE = 3


@functools.cache
def enrolled(number: int) -> bytes:
    """Volume ``number``: ``MAIN`` opens it, and ``OLD`` is its managed key, in another generation on each."""
    simulation = Simulation(make_volume([MAIN], uuid=f"{UUID[:-1]}{number}", seed=number))
    simulation.enroll(MAIN, OLD, ref=f"vault/{number}")
    for _ in range(number):
        simulation.rotate(MAIN, OLD)
    return simulation.disk.content


class SimulatedSet:
    """Several disks, one engine, and the use cases on them; ``order`` has the disk of each write and flush."""

    def __init__(self, images: Sequence[bytes], *, seed: int = 7) -> None:
        self.disks = [
            SimDisk(image, path=f"/dev/sim{number}", identity=DeviceIdentity(True, 259, number))
            for number, image in enumerate(images)
        ]
        self.order: list[int] = []
        for number, disk in enumerate(self.disks):
            disk.observer = functools.partial(self._observe, number)
        self.engine = SimEngine(seed)
        self.locks = SimLocks()
        self.probe = SimProbe()
        self.journal = SimJournal()
        self.devices = SimDevices(*self.disks)
        self.host = Host(
            self.devices,
            self.locks,
            SimShadows(),
            self.engine,
            self.probe,
            SimEntropy(seed),
            SimClock(),
            self.journal,
        )
        self.sets = VolumeSets(self.host)
        self.volumes = Volumes(self.host)
        self.refs = [DeviceRef(disk.path) for disk in self.disks]

    @property
    def images(self) -> list[bytes]:
        """What the disks hold."""
        return [disk.content for disk in self.disks]

    def stage(self, unlock: bytes = MAIN, new: bytes = NEW, **options: Any) -> SetResult:
        """Stage ``new`` on all of them."""
        with secrets(unlock=unlock, new=new) as sources:
            return run(self.sets.stage(self.refs, sources, SetRequest(None, CHEAP, **options)))

    def finish(self) -> SetResult:
        """Finish on all of them."""
        return run(self.sets.finish(self.refs))

    def abort(self) -> SetResult:
        """Abort on all of them."""
        return run(self.sets.abort(self.refs))

    def reconcile(self) -> None:
        """Reconcile each, as after a boot."""
        for ref in self.refs:
            run(self.volumes.reconcile(ref))

    def _observe(self, number: int, _: object) -> None:
        self.order.append(number)


def opens(image: bytes, secret: bytes) -> bool:
    """Whether the secret opens the volume."""
    return bool(opened_by(image, secret))


def copies(image: bytes) -> list[bytes]:
    """The volume with each of its valid header copies alone."""
    pair = parse_pair(image)
    others = {0: pair.secondary, pair.hdr_size: pair.primary}
    return [
        forge.put(image, offset, bytes(pair.hdr_size))
        for offset, other in others.items()
        if isinstance(other, HeaderCopy)
    ]
