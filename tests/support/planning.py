# SPDX-License-Identifier: GPL-2.0-or-later
"""From an image and a change to a plan, and to what the device holds after each of its steps; no I/O, no asyncio."""

import asyncio
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from luksrotd.luks2.areas import Extent
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import NEW, PBKDF_FOR_RANDOM_KEYS, UNLOCK, Edit
from luksrotd.rotation.keys import EnrollRequest, RotateRequest
from luksrotd.rotation.plan import ShadowResult, plan_commit
from luksrotd.rotation.protocol import CommitPlan, Phase
from tests.support import forge
from tests.support.simengine import SimEngine, SimSession, make_volume

KEEP, OLD, FRESH = b"keep", b"old", b"fresh"
NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
ENROLL = EnrollRequest({"ref": "vault/1"}, NOW, PBKDF_FOR_RANDOM_KEYS)
ROTATE = RotateRequest({"ref": "vault/2"}, NOW, PBKDF_FOR_RANDOM_KEYS)


def volume() -> bytes:
    """Keyslot 0 of an administrator, keyslot 1 our key "backup" of generation 1."""
    return forge.with_token(make_volume([KEEP, OLD]), 1, data={"ref": "vault/1"})


def staged_volume() -> bytes:
    """The same, and keyslot 2 (opened by ``FRESH``) its generation 2, staged."""
    image = forge.with_token(make_volume([KEEP, OLD, FRESH]), 1, data={"ref": "vault/1"})
    return forge.with_token(
        image, 2, 1, generation=2, state="staged", data={"ref": "vault/2"}, expires_at="2026-04-03T05:06:07Z"
    )


def noise(size: int) -> bytes:
    """Nothing that the simulation makes looks like this."""
    return b"\xa5" * size


class MemoryShadow:
    """A shadow in memory."""

    fd = -1

    def __init__(self, length: int) -> None:
        self._content = bytearray(length)

    @property
    def length(self) -> int:
        """Bytes."""
        return len(self._content)

    def write(self, offset: int, data: bytes) -> None:
        """Put ``data`` at ``offset``."""
        self._content[offset : offset + len(data)] = data

    def read(self, offset: int, length: int) -> bytes:
        """What is there."""
        return bytes(self._content[offset : offset + length])

    def data_extents(self) -> Sequence[Extent]:
        """One, for all of it."""
        return [Extent(0, self.length)]

    def clear(self) -> None:
        """Back to zeros."""
        self._content = bytearray(self.length)

    def close(self) -> None:
        """Nothing to do."""


def shadowed(image: bytes, change: Change, new: bytes = FRESH) -> ShadowResult:
    """What a (simulated) worker leaves of ``change`` in a shadow of ``image``; ``KEEP`` unlocks."""
    pair = forge.pair_of(image) if change.start is None else change.start.pair
    metadata = pair.winner.metadata
    areas = [slot.area for slot in metadata.keyslots.values() if metadata.opens_volume(slot.id)]
    initial = {area: image[area.offset : area.end] for area in areas} if change.start is None else change.start.areas
    shadow = MemoryShadow(pair.length)
    shadow.write(0, pair.raw)
    for area, content in initial.items():
        shadow.write(area.offset, content)
    session = SimSession(SimEngine(), shadow, {UNLOCK: KEEP, NEW: new})
    headers = len(pair.raw)

    if change.needs_unlock:
        asyncio.run(session.unlock())

    async def work(edits: tuple[Edit, ...]) -> bytes:
        await session.apply(edits)
        return shadow.read(0, headers)

    committed = asyncio.run(work(change.edits))
    final = asyncio.run(work(change.closing))
    behind = Extent(headers, pair.length - headers)
    return ShadowResult(initial, committed, final, {behind: shadow.read(behind.offset, behind.size)})


def planned(image: bytes, change: Change, new: bytes = FRESH) -> CommitPlan:
    """The plan that brings ``change`` to ``image``."""
    return plan_commit(forge.pair_of(image), change, shadowed(image, change, new), noise)


def after(image: bytes, plan: CommitPlan) -> bytes:
    """The image with the whole plan carried out."""
    for write in plan.writes:
        image = forge.put(image, write.offset, write.data)
    return image


def instants(image: bytes, plan: CommitPlan) -> Iterator[tuple[Phase | None, bytes]]:
    """The image before the plan and after each of its steps."""
    yield None, image
    for step in plan.steps:
        for write in step.writes:
            image = forge.put(image, write.offset, write.data)
        yield step.phase, image
