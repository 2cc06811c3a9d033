# SPDX-License-Identifier: GPL-2.0-or-later
"""What is done in the virtual machine while every write of its disk is recorded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tests.support.crashverbs import NEW_DATA, OLD_DATA
from tests.support.peers import ESCROW

_PBKDF: Final = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000"


@dataclass(frozen=True, slots=True)
class Scenario:
    """Shell commands, each a step whose end is marked on the disk; ``$A`` and ``$B`` are the volumes.

    ``volumes``: the verbs of ``crashverbs.VERBS`` whose volumes they are at first.  ``prepare`` is done before the
    recording begins; ``broken``: then the verb whose volume takes the place of the first one, under the mapping.
    ``atomic``: each volume is as before a step or as after it, at any time.  ``ours``: a transaction of luksrotd, or
    the work of another tool, in which violations are to be found.
    """

    steps: Mapping[str, str]
    volumes: tuple[str, ...] = ("rotation",)
    prepare: str = ":"
    broken: str = ""
    atomic: bool = True
    ours: bool = True
    needs: str = ""
    """A program that not every machine has."""
    ignore_flushes: bool = False
    """The recording of another scenario, as of a disk that ignores flushes."""


def _data(data: Mapping[str, object]) -> str:
    return f"--data '{json.dumps(data)}'"


def _new(verb: str, options: str = "", devices: str = "$A") -> str:
    return f"luksrotctl {verb} {devices} --key-file main --new-keyfile new {_data(NEW_DATA)} {_PBKDF} {options}"


_STAGE: Final = {"staged": _new("stage")}
_RECONCILE: Final = {"reconciled": "systemctl start luksrotd-reconcile@$(systemd-escape --path $A).service"}
_ESCROWED: Final = f"""
cryptsetup luksAddKey -q --key-file main {_PBKDF} --key-slot 2 $A old
echo '{json.dumps(ESCROW)}' | cryptsetup token import --token-id 0 $A
"""


def _import(options: str, keyslot: int) -> str:
    token = {**ESCROW, **NEW_DATA, "keyslots": [str(keyslot)]}
    return f"echo '{json.dumps(token)}' | cryptsetup token import {options} $A"


_ADD_AND_KILL: Final = f"""
cryptsetup luksAddKey -q --key-file main {_PBKDF} --key-slot 3 $A new
{_import("--token-id 1", 3)}
cryptsetup luksKillSlot -q --key-file main $A 2
cryptsetup token remove --token-id 0 $A
"""
_CHANGE_KEY: Final = f"""
cryptsetup luksChangeKey -q --key-file old {_PBKDF} $A new
{_import("--token-id 0 --token-replace", 2)}
"""
_CRYPTENROLL: Final = "PASSWORD=$(cat main) systemd-cryptenroll --recovery-key {} $A"

SCENARIOS: Final[Mapping[str, Scenario]] = {
    "enrolment": Scenario(
        {"enrolled": f"luksrotctl enroll $A --key-file main --new-keyfile old {_data(OLD_DATA)} {_PBKDF}"},
        ("enrolment",),
    ),
    "rotation": Scenario({"rotated": _new("rotate")}),
    "staged rotation, finished": Scenario({**_STAGE, "finished": "luksrotctl finish $A"}),
    "staged rotation, aborted": Scenario({**_STAGE, "aborted": "luksrotctl abort $A"}),
    "reconcile of a pending wipe": Scenario(_RECONCILE, broken="reconcile of a pending wipe"),
    "reconcile of a torn header": Scenario(_RECONCILE, broken="reconcile of a torn header"),
    "rotation, stepwise engine": Scenario({"rotated": _new("rotate", "--direct --engine stepwise")}, atomic=False),
    "set of two volumes": Scenario(
        {"staged": _new("stage", devices="$A $B"), "finished": "luksrotctl finish $A $B"}, ("rotation", "rotation")
    ),
    "control: rotation on a disk that ignores flushes": Scenario({"rotated": _new("rotate")}, ignore_flushes=True),
    "control: cryptsetup luksAddKey, token import, luksKillSlot, token remove": Scenario(
        {"rotated": _ADD_AND_KILL}, ("enrolment",), _ESCROWED, atomic=False, ours=False
    ),
    "control: cryptsetup luksChangeKey, token import": Scenario(
        {"rotated": _CHANGE_KEY}, ("enrolment",), _ESCROWED, atomic=False, ours=False
    ),
    "control: systemd-cryptenroll --recovery-key --wipe-slot": Scenario(
        {"rotated": f"{_CRYPTENROLL.format('--wipe-slot=recovery')} >new"},
        ("enrolment",),
        f"{_CRYPTENROLL.format('')} >old",
        needs="systemd-cryptenroll",
        atomic=False,
        ours=False,
    ),
}

#: Run in the machine, as root, in a folder with the secrets, and with ``broken`` where the scenario has it.
SCRIPT: Final = """
set -eu
exec 2>&1
trap 'echo "line $LINENO fails"' ERR
export LC_ALL=C
A=/dev/vdb3 B=/dev/vdb4
mark() {
    sync
    printf '{"done": "%s"}' "$1" | dd of=/dev/vdb1 bs=512 count=1 conv=sync,notrunc,fsync oflag=direct status=none
}
step() {
    bash -eu -c "$2"
    mark "$1"
}
export A B

blockdev --rereadpt /dev/vdb
udevadm settle
modprobe -a dm-crypt xts
systemctl stop luksrotd.service
# Not the daemon alone has its files there.
mkdir -p /run/state /var/lib/luksrotd
mount /dev/vdb2 /run/state
mkdir -m 700 /run/state/luksrotd
mount --bind /run/state/luksrotd /var/lib/luksrotd
for device in @DEVICES@; do
    name=busy-${device##*/}
    cryptsetup open --disable-external-tokens --key-file main "$device" "$name"
    mkfs.ext4 -q -E nodiscard,lazy_itable_init=1,lazy_journal_init=1 "/dev/mapper/$name" 8M
    mkdir -p "/run/$name"
    mount -o noinit_itable "/dev/mapper/$name" "/run/$name"
done
@PREPARE@
if [ -e broken ]; then
    dd if=broken of=$A bs=65536 conv=notrunc,fsync status=none
else
    systemctl start luksrotd.service
fi
udevadm settle
# Each volume is in use, all the time: mapped, mounted, and written to.
python3 busy.py /run/state /run/busy-* &
trap "kill $!" EXIT
mark begun
@STEPS@
uname -r
cryptsetup --version
for name in old new; do echo "secret $name $(base64 -w0 <$name)"; done
"""

#: Writes to a new place of a file in each folder, and has it written to the disk, as databases and journals do.
BUSY: Final = """
import os, sys, time
files = [os.open(folder + "/busy", os.O_RDWR | os.O_CREAT) for folder in sys.argv[1:]]
for number in range(1 << 30):
    for file in files:
        os.pwrite(file, os.urandom(100), number * 100 % 65536)
        os.fsync(file)
        time.sleep(0.02)
"""


def script(scenario: Scenario) -> str:
    """The script for the machine."""
    devices = " ".join(["$A", "$B"][: len(scenario.volumes)])
    steps = "\n".join(f"step '{mark}' {_quoted(command)}" for mark, command in scenario.steps.items())
    return SCRIPT.replace("@DEVICES@", devices).replace("@PREPARE@", scenario.prepare).replace("@STEPS@", steps)


def _quoted(command: str) -> str:
    return "'" + command.replace("'", "'\\''") + "'"
