# SPDX-License-Identifier: GPL-2.0-or-later
"""7: reconcile of volumes that have nothing to be mended, as at every boot."""

import asyncio
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.bench.figures import Finding, Result, Series
from tests.bench.installed import SOURCE_TREE, Program, installed
from tests.bench.rounds import Trial, interleaved
from tests.bench.stage import BENCH, run
from tests.support.daemon_process import OLD
from tests.support.makeimage import PBKDF, make_image, set_uuid

COUNTS: Final = (10, 100, 1000)
#: Of what cryptsetup takes for a volume; and how much a volume among the most may cost of one among the fewest.
LIMIT: Final = 0.1
LINEAR: Final = 1.25
FOLDER: Final = BENCH / "reconcile"
STATE: Final = FOLDER / "state"
METHOD: Final = """One luksrotctl --direct reconcile (an installed one, as in measurement 3) of 10, 100 and 1000 image
files on the disk of this machine, each a sparse volume with a key of ours and a LUKS UUID of its own; not loop
devices, of which so many cannot be had, nor --all, which looks for block devices and then does the same. All are in
order, and their inventories are there. A loop of cryptsetup luksDump runs on the same files. The start of Python and
luksrotctl, some tenths of a second, is in our figures; what a volume costs is the difference of two of them by the
difference of their numbers."""


@contextmanager
def _images(number: int) -> Iterator[list[Path]]:
    """Volumes with one key of ours, which are gone afterwards."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        first = make_image(FOLDER / "0000.img", key=OLD)
        secrets = [FOLDER / name for name in ("old", "new")]
        for path, secret in zip(secrets, (OLD, b"new"), strict=True):
            path.write_bytes(secret)
            path.chmod(0o600)
        keys = ("--key-file", str(secrets[0]), "--new-keyfile", str(secrets[1]))
        _ours("enroll", *keys, *PBKDF, str(first))
        images = [first] + [FOLDER / f"{count:04}.img" for count in range(1, number)]
        for path in images[1:]:
            run(("cp", "--sparse=always", str(first), str(path)))
            set_uuid(path, str(uuid.uuid4()))
        yield images
    finally:
        shutil.rmtree(FOLDER)


def _ours(*arguments: str, program: Program = SOURCE_TREE) -> None:
    environment = {**program.environment, "STATE_DIRECTORY": str(STATE)}
    run((*program.command, "--direct", *arguments), environment=environment)


class Reconciled:
    """So many volumes, by us and by cryptsetup; seconds for all of them."""

    def __init__(self, images: Sequence[Path], program: Program) -> None:
        self._images = [str(image) for image in images]
        self._program = program

    async def ours(self) -> float:
        """One command."""
        begun = time.perf_counter()
        await asyncio.to_thread(_ours, "reconcile", *self._images, program=self._program)
        return time.perf_counter() - begun

    async def dumps(self) -> float:
        """A command for each."""
        begun = time.perf_counter()
        for image in self._images:
            run(("cryptsetup", "luksDump", image))
        return time.perf_counter() - begun


async def clean(rounds: int) -> Result:
    """7."""
    with _images(max(COUNTS)) as images:
        trials: dict[str, Trial] = {}
        program = installed()
        for count in COUNTS:
            made = Reconciled(images[:count], program)
            trials |= {f"luksrotctl reconcile, {count}": made.ours, f"cryptsetup luksDump, {count}": made.dumps}
        series = await interleaved(trials, rounds)
    ours, dumps = series[0::2], series[1::2]
    return Result(7, "Reconcile of clean volumes", METHOD, series, [], _findings(ours, dumps), _growth(ours, dumps),
                  ("volumes", "seconds"))  # fmt: skip


def _findings(ours: Sequence[Series], dumps: Sequence[Series]) -> list[Finding]:
    first, middle, last = (one.median for one in ours)
    early = (middle - first) / (COUNTS[1] - COUNTS[0])
    late = (last - middle) / (COUNTS[2] - COUNTS[1])
    whole = ours[-1].over(dumps[-1])
    return [
        Finding(f"{whole.name}, median, our start included", whole.median, LIMIT),
        Finding("a volume of ours beyond 100, to one of cryptsetup's", late * COUNTS[2] / dumps[-1].median, LIMIT),
        Finding("a volume beyond 100, to one between 10 and 100", late / early, LINEAR),
    ]


def _growth(ours: Sequence[Series], dumps: Sequence[Series]) -> dict[str, list[tuple[float, float]]]:
    names = ("luksrotctl reconcile", "cryptsetup luksDump in a loop")
    return {
        name: [(count, one.median) for count, one in zip(COUNTS, lines, strict=True)]
        for name, lines in zip(names, (ours, dumps), strict=True)
    }
