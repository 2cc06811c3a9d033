# SPDX-License-Identifier: GPL-2.0-or-later
"""The calls of libcryptsetup that no rotation can do without, and nothing else.

``python -m tests.bench.bare NODE COST`` is a process that waits: a line on its standard input is one rotation, on
the device itself, and the line that it answers its end.
"""

import json
import subprocess
import sys
from typing import Final, Self

from luksrotd.cryptsetup.api import Context
from luksrotd.cryptsetup.memory import SafeMemory
from luksrotd.rotation.edits import Pbkdf
from tests.support.daemon_process import OLD, Disk
from tests.support.realvolume import safe

#: Of keyslots that take turns, after the one of the passphrase.
FIRST: Final = 2
DONE: Final = b"done\n"


class Bare:
    """Unlock by the passphrase, add a keyslot, open it by its own secret, destroy the one before it."""

    def __init__(self, disk: Disk, cost: Pbkdf) -> None:
        fields = {"type": cost.type, "hash": cost.hash, "iterations": cost.iterations}
        command = (sys.executable, "-m", "tests.bench.bare", disk.node, json.dumps(fields))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    async def rotate(self) -> None:
        """Wait for one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != DONE:
            raise RuntimeError("libcryptsetup alone could not rotate")


def _rotate(node: str, cost: Pbkdf, old: SafeMemory, new: SafeMemory, number: int) -> None:
    with Context(node) as context:
        keyslot, last = FIRST + number % 2, FIRST + (number + 1) % 2
        _, key = context.volume_key(old)
        with key:
            context.add_keyslot(keyslot, key, new, cost)
        if not context.opens(new, keyslot):
            raise RuntimeError(f"keyslot {keyslot} does not open")
        if not context.keyslot_free(last):
            context.destroy_keyslot(last)


def _serve(node: str, cost: Pbkdf) -> None:
    with safe(OLD) as old, safe(OLD + b" new") as new:
        for number, _ in enumerate(sys.stdin.buffer):
            _rotate(node, cost, old, new, number)
            sys.stdout.buffer.write(DONE)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], Pbkdf(**json.loads(sys.argv[2])))
