# SPDX-License-Identifier: GPL-2.0-or-later
"""Unlocking in the initramfs at every crash point: the cryptsetup and blkid that Debian puts there, on every state that
a power cut leaves of an operation."""

import os
import subprocess

import pytest

from tests.beds import roots
from tests.beds.initramfs import initramfs
from tests.support.crashjudge import pair_of
from tests.support.crashverbs import SECRETS, described
from tests.support.kernel import LoopDevice, die_with_parent
from tests.support.realvolume import Geometry, recorded

#: Rotation on small sectors, of which there are more states; what else makes keyslots come and go on large ones.
OPERATIONS = [
    ("rotation", Geometry()),
    *((verb, Geometry(sector=4096)) for verb in ("enrolment", "removal")),
]
#: So many states there are at least.
LEAST = 250
#: With a device, and two keys that have to open it, as unlock_mapping of /lib/cryptsetup/functions has it done: with
#: the passphrase from the pipe of the keyscript; but for the device-mapper, which the kernel here may lack.  The first
#: one as if the disk were read-only, so that no header is mended before the other does it.  What blkid says is what
#: udev's rules make /dev/disk/by-uuid of, for which cryptroot waits.
SCRIPT = """
/sbin/blkid -p -o export "$1"
open() {
    cat "/keys/$2" | /sbin/cryptsetup -T1 --type=luks --key-file=- $3 open --test-passphrase -- "$1" || echo "not by $2"
}
[ -z "$2" ] || open "$1" "$2" --readonly
open "$1" "$3" --allow-discards
"""


class Inside:
    """The files of an initramfs as the root of processes.

    It has a /dev with ``device`` and little else, a /run that is empty, and neither udev nor anything mounted.
    """

    def __init__(self, files, root, device):
        subprocess.run(["cp", "--archive", str(files), str(root)], check=True)
        self._root = root
        (root / "dev").mkdir(exist_ok=True)
        os.mknod(root / "dev/null", 0o20666, os.makedev(1, 3))
        os.mknod(root / "dev/random", 0o20666, os.makedev(1, 8))
        os.mknod(root / "dev/urandom", 0o20666, os.makedev(1, 9))
        (root / "keys").mkdir()
        for name, key in SECRETS.items():
            (root / "keys" / name).write_bytes(key)
        os.mknod(root / device.relative_to("/"), 0o60600, device.stat().st_rdev)

    def tell(self, *arguments):
        """What ``SCRIPT`` says."""
        return subprocess.run(
            ["/bin/sh", "-c", SCRIPT, "sh", *arguments],
            env={"PATH": "/sbin:/bin"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            preexec_fn=self._enter,
        ).stdout.splitlines()

    def _enter(self):
        die_with_parent()
        os.chroot(self._root)
        os.chdir("/")


def write(device, image):
    """Through the device, so that no reader of it sees what was there before."""
    fd = os.open(device, os.O_WRONLY)
    try:
        os.pwrite(fd, bytes(image), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def named_key(image):
    """The name of the key that the token of the state describes; '' without one."""
    tokens = pair_of(image).winner.metadata.raw["tokens"].values()
    return next((name for token in tokens if (name := described(token)) is not None), "")


def problems(inside, device, image):
    """What the initramfs cannot do with a state."""
    write(device, image)
    said = set(inside.tell(device, named_key(image), "main"))
    if not {f"UUID={pair_of(image).winner.header.uuid}", "TYPE=crypto_LUKS"} <= said:
        yield "not found by its UUID"
    yield from (line for line in said if "=" not in line)


@pytest.fixture(params=roots.RELEASES)
def files(request):
    return initramfs(request.param).files


def test_every_crash_state_is_unlocked(files, tmp_path):
    wrong = set()
    states = 0
    path = tmp_path / "volume"
    for number, (verb, geometry) in enumerate(OPERATIONS):
        operation = recorded(verb, geometry)
        path.write_bytes(operation.before)
        with LoopDevice(path, geometry.sector) as loop:
            inside = Inside(files, tmp_path / f"root-{number}", loop.path)
            for image in operation.enumeration().images():
                states += 1
                wrong |= {f"{verb}, state {states}: {what}" for what in problems(inside, str(loop.path), image)}
    assert wrong == set()
    assert states > LEAST
