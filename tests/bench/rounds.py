# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs contenders side by side: round after round, each once a round, in an order that chance makes."""

import random
import time
from collections.abc import Awaitable, Callable, Mapping

from tests.bench.figures import Series

#: Does its work once; the figure, if it is not the time that it took.
Trial = Callable[[], Awaitable[float | None]]


async def interleaved(contenders: Mapping[str, Trial], rounds: int, *, unit: str = "s", seed: int = 1) -> list[Series]:
    """So many rounds, after one that does not count.  What disturbs the machine for a while disturbs all of them."""
    order, chance = list(contenders), random.Random(seed)
    values: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        chance.shuffle(order)
        for name in order:
            begun = time.perf_counter()
            own = await contenders[name]()
            took = time.perf_counter() - begun
            if number:
                values[name].append(took if own is None else own)
    return [Series(name, unit, tuple(found)) for name, found in values.items()]
