# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes on the disks of virtual machines: made, and looked at, on the host, by what a machine does not know."""

import json
import subprocess
import sys
from pathlib import Path

from tests.beds.machine import DISK_BYTES
from tests.support.daemon_process import BACKUP, NEW, OLD
from tests.support.makeimage import make_image

#: A volume of which a disk has several.
SMALL = 18 << 20
#: Names, in a machine, of files with the keys; and what ``kit.sh`` has.
KEYS = {"old": OLD, "backup": BACKUP, "new": NEW}
KIT = Path(__file__).with_name("kit.sh").read_bytes()
FILES = {**KEYS, "kit.sh": KIT}


def make_volume(path, size=DISK_BYTES):
    """A volume in a file: ``OLD`` opens it, and ``BACKUP``, the managed key."""
    make_image(path, key=OLD, size=size)
    for name, key in KEYS.items():
        (path.parent / name).write_bytes(key)
        (path.parent / name).chmod(0o600)
    luksrotctl(
        *("enroll", path, f"--key-file={path.parent / 'old'}", f"--new-keyfile={path.parent / 'backup'}"),
        *("--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000"),
    )
    return path


def luksrotctl(*arguments):
    """Run it on the host, without the daemon; status 0 is expected.  What it printed."""
    argv = [sys.executable, "-m", "luksrotd.ctl", "--direct", *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def opens(path, key):
    """Whether a keyslot takes it, by the cryptsetup command."""
    argv = ["cryptsetup", "open", "--test-passphrase", "--disable-external-tokens", "--key-file=-", str(path)]
    return subprocess.run(argv, input=key, capture_output=True, check=False).returncode == 0


def header(path):
    """The metadata, by the cryptsetup command."""
    argv = ["cryptsetup", "luksDump", "--dump-json-metadata", str(path)]
    return json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)


def managed(path):
    """Our tokens."""
    return [token for token in header(path)["tokens"].values() if token["type"].startswith("luksrotd")]


def kit(script):
    """The script, with what ``kit.sh`` has."""
    return f". ./kit.sh\n{script}"


def put(disk, volumes):
    """Write volumes into a disk, at ``places``."""
    with disk.open("wb") as file:
        for number, volume in enumerate(volumes):
            file.seek(place(number))
            file.write(volume.read_bytes())


def place(number):
    """Where a volume begins on a disk that has several, in bytes; at the disk's begin there is none."""
    return (1 << 20) + number * (32 << 20)


def cut_out(disk, number, path):
    """One of them again, in a file of its own."""
    with disk.open("rb") as file:
        file.seek(place(number))
        path.write_bytes(file.read(SMALL))
    return path
