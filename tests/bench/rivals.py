# SPDX-License-Identifier: GPL-2.0-or-later
"""What a user would run instead: a backup key is replaced by another one, with the tools that every Debian has.

Each object has a volume of its own, enrolled once, so that each ``rotate`` finds what the one before has left.
"""

import json
from collections.abc import Sequence

from tests.bench.stage import FOLDER, Runner, run
from tests.support.daemon_process import BACKUP, NEW, OLD, Disk
from tests.support.makeimage import PBKDF


class Cryptsetup:
    """luksAddKey, token import, luksKillSlot, token remove: the shortest sequence that never is without a key.

    The old keyslot is killed without a passphrase, which spares a key derivation.  ``cost`` is of options for
    luksAddKey; without any it makes its benchmark.
    """

    name = "cryptsetup"

    def __init__(self, disk: Disk, cost: Sequence[str] = PBKDF, runner: Runner = run) -> None:
        self._node, self._cost, self._runner = disk.node, cost, runner
        self._files = {}
        for name, secret in {"main": OLD, "0": BACKUP, "1": NEW}.items():
            self._files[name] = FOLDER / f"secret-{name}"
            self._files[name].write_bytes(secret)
        self._number = 0
        self._add(self._number)

    async def rotate(self) -> None:
        """Keyslots and tokens of two numbers take turns."""
        old, self._number = self._number, 1 - self._number
        self._add(self._number)
        self._run("luksKillSlot", self._node, str(2 + old))
        self._run("token", "remove", "--token-id", str(old), self._node)

    def _add(self, number: int) -> None:
        keyslot = str(2 + number)
        new = str(self._files[str(number)])
        self._run(
            *("luksAddKey", "--key-file", str(self._files["main"]), "--key-slot", keyslot), *self._cost, self._node, new
        )
        token = {"type": "escrow", "keyslots": [keyslot], "ref": f"vault/{number}"}
        self._run("token", "import", "--token-id", str(number), self._node, stdin=json.dumps(token).encode())

    def _run(self, *arguments: str, stdin: bytes = b"") -> None:
        self._runner(("cryptsetup", "--batch-mode", *arguments), stdin=stdin)


class Cryptenroll:
    """systemd-cryptenroll --recovery-key --wipe-slot=recovery; its new keyslot is always pbkdf2 of the least cost."""

    name = "systemd-cryptenroll"

    def __init__(self, disk: Disk, runner: Runner = run) -> None:
        self._node, self._runner = disk.node, runner
        self._run("--recovery-key")

    async def rotate(self) -> None:
        """One command."""
        self._run("--recovery-key", "--wipe-slot=recovery")

    def _run(self, *arguments: str) -> None:
        self._runner(("systemd-cryptenroll", *arguments, self._node), environment={"PASSWORD": OLD.decode()})
