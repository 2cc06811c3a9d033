# SPDX-License-Identifier: GPL-2.0-or-later
"""Steps of the stepwise engine carried out on an image in memory, by the simulated libcryptsetup."""

import asyncio
from collections.abc import Iterable

from luksrotd.rotation.edits import NEW, UNLOCK, Edit
from tests.support.planning import FRESH, KEEP, MemoryShadow
from tests.support.simengine import SimEngine, SimSession


def stepped(image: bytes, edits: Iterable[Edit], new: bytes = FRESH, seed: int = 7) -> list[bytes]:
    """The image before the first of ``edits`` and after each of them; ``KEEP`` unlocks."""
    shadow = MemoryShadow(len(image))
    shadow.write(0, image)
    session = SimSession(SimEngine(seed), shadow, {UNLOCK: KEEP, NEW: new})
    images = [image]

    async def work() -> None:
        await session.unlock()
        for edit in edits:
            await session.apply([edit])
            images.append(shadow.read(0, len(image)))

    asyncio.run(work())
    return images
