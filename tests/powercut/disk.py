# SPDX-License-Identifier: GPL-2.0-or-later
"""The disk of a scenario: the daemon's state and the volumes side by side, so that one log orders all their writes."""

import functools
import json
import subprocess
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from luksrotd.luks2.pair import parse_pair
from tests.powercut.states import Part
from tests.support.crashverbs import VERBS
from tests.support.makeimage import import_token, set_uuid
from tests.support.realvolume import RealSimulation, base_volume

MIB: Final = 1024 * 1024
#: The whole disk: what the saved machines were booted with.  What we use of it ends much earlier.
DISK_SIZE: Final = 256 * MIB
#: /dev/vdb1: sectors that the scenario writes when a step has been done; 2: /var/lib/luksrotd; 3 and 4: the volumes.
MARKS: Final = Part("marks", 1 * MIB, 1 * MIB)
STATE: Final = Part("state", 2 * MIB, 8 * MIB)
VOLUMES: Final = (Part("A", 12 * MIB, 24 * MIB), Part("B", 36 * MIB, 24 * MIB))
USED: Final = 60 * MIB

#: The foreign token that every volume has; its number, and what is in it.  Long, and behind ours in the JSON text:
#: where ours grows or shrinks, many sectors change.
FOREIGN: Final = (5, {"type": "acme", "keyslots": ["1"], "text": " ".join(f"{n:x}" for n in range(900))})


def headers_of(content: bytes) -> int:
    """How many bytes of a volume belong to its header and keyslots: those before its data."""
    segment = parse_pair(content).winner.metadata.raw["segments"]["0"]
    return int(segment["offset"])


@functools.cache
def volume(verb: str, number: int = 0) -> bytes:
    """A volume on which a verb of ``crashverbs.VERBS`` begins, up to its data; ``number``: another volume."""
    with tempfile.NamedTemporaryFile(prefix="luksrotd-powercut-") as file:
        path = Path(file.name)
        path.write_bytes(base_volume())
        set_uuid(path, str(uuid.uuid5(uuid.NAMESPACE_URL, f"luksrotd power cut {number}")))
        import_token(path, FOREIGN[1], FOREIGN[0])
        simulation = RealSimulation(path.read_bytes())
    VERBS[verb].prepare(simulation)
    content = simulation.disk.content
    return content[: headers_of(content)]


def make_disk(path: Path, verbs: Sequence[str]) -> None:
    """A disk with a partition table, an empty state file system, and a volume for each of ``verbs``."""
    with path.open("wb") as file:
        file.truncate(DISK_SIZE)
        file.write(_partitions([MARKS, STATE, *VOLUMES]))
        for number, (part, verb) in enumerate(zip(VOLUMES, verbs, strict=False)):
            file.seek(part.offset)
            file.write(volume(verb, number))
    options = ["-q", "-F", "-t", "ext4", "-b", "1024", "-E", f"offset={STATE.offset},lazy_itable_init=0"]
    subprocess.run(["mkfs.ext4", *options, str(path), f"{STATE.size // 1024}k"], check=True)


def mark_of(data: bytes) -> str | None:
    """Which step a write to the part ``MARKS`` says was done; ``None`` for other writes."""
    try:
        text = json.loads(data[:512].rstrip(b"\0 \n"))
    except ValueError:
        return None
    return str(text["done"]) if isinstance(text, Mapping) and "done" in text else None


def _partitions(parts: Sequence[Part]) -> bytes:
    """A master boot record."""
    table = bytearray(512)
    for number, part in enumerate(parts):
        start, count = part.offset // 512, part.size // 512
        entry = b"\0\xfe\xff\xff\x83\xfe\xff\xff" + start.to_bytes(4, "little") + count.to_bytes(4, "little")
        table[446 + 16 * number : 462 + 16 * number] = entry
    table[510:512] = b"\x55\xaa"
    return bytes(table)
