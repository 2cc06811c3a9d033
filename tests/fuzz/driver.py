# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs one target under atheris: ``python -m tests.fuzz.TARGET [libFuzzer's options] CORPUS``.

What is fuzzed must have been imported under ``atheris.instrument_imports`` before this module is used.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random

import atheris

from tests.support import mutation

Check = Callable[[bytes], None]
Mutate = Callable[[bytes, int, int], bytes]


class Choices(Random):
    """Draws from given bytes, then zeros: so an input is a series of choices, and a part of it can be altered alone."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._rest = data

    def getrandbits(self, k: int, /) -> int:
        """``k`` bits."""
        size = -(-k // 8)
        taken, self._rest = self._rest[:size].ljust(size, b"\0"), self._rest[size:]
        return int.from_bytes(taken, "big") >> (size * 8 - k)

    def random(self) -> float:
        """A number below 1."""
        return self.getrandbits(16) / 2**16


def some_choices() -> Iterator[bytes]:
    """Inputs to begin with: libFuzzer alters few bytes at a time, and would come to many places late."""
    return (Random(seed).randbytes(128) for seed in range(300))


def mutate_json(data: bytes, max_size: int, seed: int) -> bytes:
    """JSON to other JSON, one time in four to other bytes."""
    rng = Random(seed)
    if rng.random() < 0.75:
        try:
            altered = mutation.altered_json(rng, json.loads(data))
            return json.dumps(altered, ensure_ascii=False).encode("utf-8", "surrogatepass")[:max_size]
        except (ValueError, RecursionError):
            pass
    return bytes(atheris.Mutate(data, max_size))


def run(check: Check, seeds: Iterable[bytes], mutate: Mutate | None = None) -> None:
    """Fuzz ``check``, which raises on a failure, from ``seeds`` on; never returns."""
    corpus = Path(sys.argv[-1])
    if corpus.is_dir():
        for number, seed in enumerate(seeds):
            (corpus / f"seed-{number}").write_bytes(seed)
    more = {} if mutate is None else {"custom_mutator": mutate}
    atheris.Setup(sys.argv, check, **more)
    atheris.Fuzz()
