# SPDX-License-Identifier: GPL-2.0-or-later
"""How other tools rotate a backup key, and our stepwise engine, which writes as they do: by libcryptsetup, on the
device itself.  Seen by strace, for the same enumeration as our own transactions."""

import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.support.crashverbs import NEW_DATA, OLD_DATA, SECRETS, VERBS
from tests.support.makeimage import PBKDF, add_key, import_token
from tests.support.realvolume import Geometry, RealSimulation, Recorded, base_volume
from tests.support.recorder import record
from tests.support.simulation import MAIN, OLD

if TYPE_CHECKING:
    from tests.support.crash import Epoch
    from tests.support.simdisk import Write

ESCROW: Final = {"type": "escrow", "keyslots": ["2"], **OLD_DATA}


@dataclass(frozen=True, slots=True)
class Observed:
    """An operation of several commands; ``secrets`` are those in play, by name."""

    recorded: Recorded
    secrets: Mapping[str, bytes]


class Workbench:
    """An image file with a real volume, and files with the secrets."""

    def __init__(self, directory: Path, content: bytes) -> None:
        self.image = directory / "volume.img"
        self.image.write_bytes(content)
        self.files = {name: directory / name for name in SECRETS}
        for name, path in self.files.items():
            path.write_bytes(SECRETS[name])
        self.epochs: list[list[Write]] = [[]]
        self.before = content

    def begin(self) -> None:
        """What was done up to here is preparation."""
        self.before = self.image.read_bytes()

    def run(self, *command: str, stdin: bytes = b"", **environment: str) -> str:
        """Run and record; the output."""
        done = record(
            command, self.image, stdin=stdin, environment={"PYTHONPATH": os.pathsep.join(sys.path), **environment}
        )
        assert done.status == 0, done.stderr.decode()
        first, *rest = done.epochs
        self.epochs[-1] += first
        self.epochs += rest
        return done.stdout.decode()

    def cryptsetup(self, *arguments: str, stdin: bytes = b"") -> str:
        """The same of a cryptsetup command."""
        return self.run("cryptsetup", "--batch-mode", *arguments, stdin=stdin)


Operate = Callable[[Workbench], Mapping[str, bytes]]


def add_and_kill(bench: Workbench) -> Mapping[str, bytes]:
    """luksAddKey, token import, luksKillSlot, token remove."""
    _escrowed(bench)
    files = bench.files
    bench.cryptsetup("luksAddKey", "--key-file", str(files["main"]), *PBKDF, str(bench.image), str(files["new"]))
    token = {**ESCROW, **NEW_DATA, "keyslots": ["3"]}
    bench.cryptsetup("token", "import", "--token-id", "1", str(bench.image), stdin=json.dumps(token).encode())
    bench.cryptsetup("luksKillSlot", "--key-file", str(files["main"]), str(bench.image), "2")
    bench.cryptsetup("token", "remove", "--token-id", "0", str(bench.image))
    return SECRETS


def change_key(bench: Workbench) -> Mapping[str, bytes]:
    """luksChangeKey of the keyslot; the token stays as it is."""
    _escrowed(bench)
    files = bench.files
    bench.cryptsetup("luksChangeKey", "--key-file", str(files["old"]), *PBKDF, str(bench.image), str(files["new"]))
    return SECRETS


def change_key_and_token(bench: Workbench) -> Mapping[str, bytes]:
    """The same, and the token after it."""
    change_key(bench)
    token = {**ESCROW, **NEW_DATA}
    arguments = ("token", "import", "--token-id", "0", "--token-replace", str(bench.image))
    bench.cryptsetup(*arguments, stdin=json.dumps(token).encode())
    return SECRETS


def cryptenroll(bench: Workbench) -> Mapping[str, bytes]:
    """systemd-cryptenroll --recovery-key --wipe-slot=recovery, over a recovery key that is there."""
    old = bench.run("systemd-cryptenroll", "--recovery-key", str(bench.image), PASSWORD=MAIN.decode())
    bench.epochs = [[]]
    bench.begin()
    command = ("systemd-cryptenroll", "--recovery-key", "--wipe-slot=recovery", str(bench.image))
    new = bench.run(*command, PASSWORD=MAIN.decode())
    return {**SECRETS, "old": _key(old), "new": _key(new)}


#: By name, as the table prints them.
PEERS: Final[Mapping[str, Operate]] = {
    "cryptsetup luksAddKey, token import, luksKillSlot, token remove": add_and_kill,
    "cryptsetup luksChangeKey": change_key,
    "cryptsetup luksChangeKey, token import": change_key_and_token,
    "systemd-cryptenroll --recovery-key --wipe-slot": cryptenroll,
}


def stepwise(verb: str) -> Operate:
    """An operation of ours in steps, on the volume that the verb's scenario prepares."""

    def operate(bench: Workbench) -> Mapping[str, bytes]:
        bench.begin()
        bench.run(sys.executable, "-m", "tests.support.stepper", verb, str(bench.image))
        return SECRETS

    return operate


#: What the stepwise engine does in its own way.
STEPWISE: Final = ("enrolment", "rotation", "staging", "finish", "abort", "removal")


@functools.cache
def observed(name: str, geometry: Geometry = Geometry()) -> Observed:  # noqa: B008 - immutable
    """A peer's sequence, by its name, or a verb of ``STEPWISE`` in steps ("stepwise rotation"), on an image."""
    verb = name.removeprefix("stepwise ")
    content = base_volume(geometry.metadata, geometry.bits)
    if name in PEERS:
        operate = PEERS[name]
    else:
        operate = stepwise(verb)
        simulation = RealSimulation(content, sector_size=geometry.sector)
        VERBS[verb].prepare(simulation)
        content = simulation.disk.content
    with tempfile.TemporaryDirectory(prefix="luksrotd-peers-") as directory:
        bench = Workbench(Path(directory), content)
        secrets = operate(bench)
        epochs: Sequence[Epoch] = bench.epochs if bench.epochs[-1] else bench.epochs[:-1]
        return Observed(Recorded(geometry, bench.before, epochs, bench.image.read_bytes()), secrets)


def _escrowed(bench: Workbench) -> None:
    """A backup key in keyslot 2, with a token that says where it is."""
    add_key(bench.image, MAIN, OLD, "--key-slot", "2")
    import_token(bench.image, ESCROW, 0)
    bench.begin()


def _key(printed: str) -> bytes:
    """The recovery key in what systemd-cryptenroll prints."""
    return next(line for line in printed.split() if line.count("-") == 7).encode()
