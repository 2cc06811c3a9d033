# SPDX-License-Identifier: GPL-2.0-or-later
"""1 to 3: a rotation, against the sequences of other tools."""

from collections.abc import Mapping, Sequence
from typing import Final

from dbus_next.signature import Variant

from tests.bench.figures import Finding, Result, Series, fastest
from tests.bench.installed import SOURCE_TREE, Program, installed
from tests.bench.rivals import Cryptenroll, Cryptsetup
from tests.bench.rounds import Trial, interleaved
from tests.bench.stage import FOLDER, Runner, Stage, run, stage
from tests.support import makeimage
from tests.support.daemon_process import BACKUP, FAST, NEW, OLD, Disk
from tests.support.makeimage import PBKDF

OURS: Final = "luksrotd"
RIVALS: Final = ("cryptsetup", "cryptenroll")
SECRETS: Final = (BACKUP, NEW)
ARGON: Final = ("--pbkdf", "argon2id")
SEQUENCES: Final = """Against four commands of cryptsetup (luksAddKey, token import, luksKillSlot, token remove), and
systemd-cryptenroll --recovery-key --wipe-slot=recovery. Each has a volume of its own, an image on the disk behind a
loop device."""
CHEAP_METHOD: Final = f"""The daemon runs, and a client on the bus calls Rotate and waits for Completed: so polkit,
job, locks, worker and commit are in it. Keyslots are pbkdf2 with 1000 iterations: what is seen is all but key
derivation. {SEQUENCES}"""
COSTLY_METHOD: Final = f"""The same, but the passphrase that unlocks and the new one are Argon2id keyslots of the cost
that libcryptsetup chooses on this machine. {SEQUENCES} systemd-cryptenroll makes its new keyslot with pbkdf2 of 1000
iterations whatever the others are, and so derives one costly key only."""
COLD_METHOD: Final = f"""Each rotation starts Python and luksrotctl anew, with no daemon; pbkdf2 with 1000 iterations.
luksrotctl is an installed one (a virtual environment, made for this), whose modules are compiled as every installer
does it; in the source tree it would take longer. {SEQUENCES}"""


class OverDBus:
    """The daemon is there; a client calls Rotate and waits for the end of the job."""

    def __init__(self, stage: Stage, disk: Disk, cost: Mapping[str, Variant] = FAST) -> None:
        self._stage, self._disk, self._cost = stage, disk, cost
        self._number = 0

    async def enroll(self) -> None:
        """The key that is rotated."""
        await self._stage.job(self._disk, "Enroll", new=SECRETS[0], cost=self._cost)

    async def rotate(self) -> None:
        """Two secrets take turns."""
        self._number = 1 - self._number
        await self._stage.job(self._disk, "Rotate", new=SECRETS[self._number], cost=self._cost)


class Direct:
    """luksrotctl --direct: a process of its own for each rotation, and no daemon."""

    def __init__(self, disk: Disk, runner: Runner = run, program: Program = SOURCE_TREE) -> None:
        self._node, self._runner, self._program = disk.node, runner, program
        self._files = {name: FOLDER / f"direct-{name}" for name in ("main", "0", "1")}
        for path, secret in zip(self._files.values(), (OLD, *SECRETS), strict=True):
            path.write_bytes(secret)
            path.chmod(0o600)
        self._number = 0
        self._run("enroll")

    async def rotate(self) -> None:
        """Two secrets take turns."""
        self._number = 1 - self._number
        self._run("rotate")

    def _run(self, verb: str) -> None:
        keys = ("--key-file", str(self._files["main"]), "--new-keyfile", str(self._files[str(self._number)]))
        command = (*self._program.command, "--direct", verb, *keys, *PBKDF, self._node)
        self._runner(command, environment=self._program.environment)


async def cheap(rounds: int) -> Result:
    """1."""
    async with stage() as place:
        ours = OverDBus(place, await place.known(place.volume("rotation")))
        await ours.enroll()
        series = await _beside(place, {OURS: ours.rotate}, rounds)
    return Result(1, "Rotation over D-Bus, cheap key derivation", CHEAP_METHOD, *_compared(series, 0.7))


async def costly(rounds: int) -> Result:
    """2."""
    async with stage() as place:
        disks = [place.volume(name) for name in ("costly", *RIVALS)]
        for disk in disks:
            makeimage.run("luksConvertKey", *ARGON, "--key-file", "-", disk.node, stdin=OLD)
        ours = OverDBus(place, await place.known(disks[0]), {})
        await ours.enroll()
        series = await _beside(place, {OURS: ours.rotate}, rounds, disks[1:], ())
    return Result(2, "Rotation over D-Bus, Argon2id at its default cost", COSTLY_METHOD, *_compared(series, 0.5))


async def cold(rounds: int) -> Result:
    """3."""
    async with stage(daemon=False) as place:
        ours = Direct(place.volume("direct"), program=installed())
        series = await _beside(place, {"luksrotctl --direct": ours.rotate}, rounds)
    figures, ratios, findings = _compared(series, 2.5)
    findings.append(Finding("median of all rounds", figures[0].median, 0.25, "s"))
    return Result(3, "luksrotctl --direct, cold, cheap key derivation", COLD_METHOD, figures, ratios, findings)


async def _beside(
    place: Stage, ours: Mapping[str, Trial], rounds: int, disks: Sequence[Disk] = (), cost: Sequence[str] = PBKDF
) -> list[Series]:
    """Ours and the others, each on a volume of its own."""
    first, second = disks or [place.volume(name) for name in RIVALS]
    others = Cryptsetup(first, cost), Cryptenroll(second)
    return await interleaved({**ours, **{other.name: other.rotate for other in others}}, rounds)


def _compared(series: Sequence[Series], limit: float) -> tuple[Sequence[Series], list[Series], list[Finding]]:
    """The first is ours, which is to take at most ``limit`` of what the fastest of the others takes."""
    ours, *others = series
    ratios = [ours.over(other) for other in others]
    best = ours.over(fastest(others))
    return series, ratios, [Finding(f"{best.name}, median", best.median, limit)]
