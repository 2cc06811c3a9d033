# SPDX-License-Identifier: GPL-2.0-or-later
"""1 to 3: a rotation, against the sequences of other tools."""

import json
from collections.abc import Mapping, Sequence
from typing import Final

from dbus_next.signature import Variant

from luksrotd.rotation.edits import Pbkdf
from tests.bench.bare import Bare
from tests.bench.figures import Finding, Result, Series, fastest
from tests.bench.installed import SOURCE_TREE, Program, installed
from tests.bench.rivals import Cryptenroll, Cryptsetup
from tests.bench.rounds import Trial, interleaved
from tests.bench.stage import FOLDER, Runner, Stage, run, stage
from tests.support import makeimage
from tests.support.daemon_process import BACKUP, FAST, NEW, OLD, Disk
from tests.support.makeimage import PBKDF

OURS: Final = "luksrotd"
LIBRARY: Final = "libcryptsetup alone"
RIVALS: Final = ("cryptsetup", "cryptenroll")
SECRETS: Final = (BACKUP, NEW)
ARGON: Final = ("--pbkdf", "argon2id")
SEQUENCES: Final = """Against four commands of cryptsetup (luksAddKey, token import, luksKillSlot, token remove), and
systemd-cryptenroll --recovery-key --wipe-slot=recovery. Each has a volume of its own, an image on the disk behind a
loop device; that says that it rotates, so libcryptsetup overwrites an old keyslot 40 times there, with one flush."""
ALONE: Final = """"libcryptsetup alone" is a process that is there already and makes, on the device, the four calls that
are the work itself: unlock, add a keyslot, open it by its own secret, destroy the old one. No token, no lock but
libcryptsetup's, no order of writes: it shows what is left to gain."""
CHEAP_METHOD: Final = f"""The daemon runs, and a client on the bus calls Rotate and waits for Completed: so polkit,
job, locks, worker and commit are in it. Keyslots are pbkdf2 with 1000 iterations: what is seen is all but key
derivation. {SEQUENCES} {ALONE}"""
COSTLY_METHOD: Final = f"""The same, but the passphrase that unlocks is an Argon2id keyslot of the cost that
libcryptsetup chooses on this machine, the same for all. {SEQUENCES} "luksrotd" is given a new passphrase, and makes an
Argon2id keyslot for it, as cryptsetup does here: both with libcryptsetup's benchmark. "luksrotd, cost given" makes one
of the cost of the passphrase that unlocks, without a benchmark, as it does for all where an administrator configures
the cost ([KeyDerivation] in luksrotd.conf(5)). "luksrotd, generated key" has the key made, as systemd-cryptenroll
does: a key of 256 random bits, for which pbkdf2 with 1000 iterations is enough, so that one costly key is derived only.
{ALONE}"""
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


class Generated:
    """The same for a key that the daemon makes, and that the client takes and confirms."""

    def __init__(self, stage: Stage, disk: Disk) -> None:
        self._stage, self._disk = stage, disk

    async def enroll(self) -> None:
        """The key that is rotated."""
        await self._make("Enroll")

    async def rotate(self) -> None:
        """Another one."""
        await self._make("Rotate")

    async def _make(self, method: str) -> None:
        await self._stage.job(self._disk, method, taken=True, new=None, cost={})


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
        with Bare(place.volume("alone"), Pbkdf("pbkdf2", iterations=1000)) as bare:
            series = await _beside(place, {OURS: ours.rotate}, rounds, bare=bare)
    return Result(1, "Rotation over D-Bus, cheap key derivation", CHEAP_METHOD, *_compared(series, 0.7))


async def costly(rounds: int) -> Result:
    """2."""
    async with stage() as place:
        disks = [place.volume(name) for name in ("costly", "given", "generated", "alone", *RIVALS)]
        cost = _make_costly(disks)
        ours: dict[str, OverDBus | Generated] = {
            OURS: OverDBus(place, await place.known(disks[0]), {}),
            f"{OURS}, cost given": OverDBus(place, await place.known(disks[1]), cost),
            f"{OURS}, generated key": Generated(place, await place.known(disks[2])),
        }
        for one in ours.values():
            await one.enroll()
        trials = {name: one.rotate for name, one in ours.items()}
        with Bare(disks[3], Pbkdf()) as bare:
            series = await _beside(place, trials, rounds, disks[4:], (), bare)
    return Result(2, "Rotation over D-Bus, Argon2id at its default cost", COSTLY_METHOD, *_compared_alike(series, 0.5))


async def cold(rounds: int) -> Result:
    """3."""
    async with stage(daemon=False) as place:
        ours = Direct(place.volume("direct"), program=installed())
        series = await _beside(place, {"luksrotctl --direct": ours.rotate}, rounds)
    figures, ratios, findings = _compared(series, 2.5)
    findings.append(Finding("median of all rounds", figures[0].median, 0.25, "s"))
    return Result(3, "luksrotctl --direct, cold, cheap key derivation", COLD_METHOD, figures, ratios, findings)


def _make_costly(disks: Sequence[Disk]) -> dict[str, Variant]:
    """The passphrase of all of them costs what libcryptsetup chooses for the first: its choice differs every time.

    That cost, as options of Rotate.
    """
    first, *others = disks
    makeimage.run("luksConvertKey", *ARGON, "--key-file", "-", first.node, stdin=OLD)
    kdf = json.loads(run(("cryptsetup", "luksDump", "--dump-json-metadata", first.node)))["keyslots"]["0"]["kdf"]
    cost = {"pbkdf-force-iterations": kdf["time"], "pbkdf-memory": kdf["memory"], "pbkdf-parallel": kdf["cpus"]}
    options = [text for name, value in cost.items() for text in (f"--{name}", str(value))]
    for disk in others:
        makeimage.run("luksConvertKey", *ARGON, *options, "--key-file", "-", disk.node, stdin=OLD)
    return {"pbkdf": Variant("s", ARGON[1])} | {name: Variant("u", value) for name, value in cost.items()}


async def _beside(
    place: Stage,
    ours: Mapping[str, Trial],
    rounds: int,
    disks: Sequence[Disk] = (),
    cost: Sequence[str] = PBKDF,
    bare: Bare | None = None,
) -> list[Series]:
    """Ours and the others, each on a volume of its own."""
    first, second = disks or [place.volume(name) for name in RIVALS]
    others = Cryptsetup(first, cost), Cryptenroll(second)
    alone = {} if bare is None else {LIBRARY: bare.rotate}
    return await interleaved({**ours, **{other.name: other.rotate for other in others}, **alone}, rounds)


def _compared(series: Sequence[Series], limit: float) -> tuple[Sequence[Series], list[Series], list[Finding]]:
    """The first is ours, which is to take at most ``limit`` of what the fastest of the others takes."""
    ours, *others = series
    ratios = [ours.over(other) for other in others]
    best = ours.over(fastest(other for other in others if other.name != LIBRARY))
    return series, ratios, [Finding(f"{best.name}, median", best.median, limit)]


def _compared_alike(series: Sequence[Series], limit: float) -> tuple[Sequence[Series], list[Series], list[Finding]]:
    """Each way of ours with the one of the others that makes the same kind of keyslot."""
    passphrase, given, generated, cryptsetup, cryptenroll, alone = series
    ratios = [passphrase.over(cryptsetup), given.over(cryptsetup), generated.over(cryptenroll), passphrase.over(alone)]
    return series, ratios, [Finding(f"{one.name}, median", one.median, limit) for one in ratios[:3]]
