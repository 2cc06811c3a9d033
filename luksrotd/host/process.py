# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel tells of a process: its name, which it chooses itself, and its systemd unit.  For the record only.

The unit's ``ProtectProc=invisible`` hides nothing here: the daemon is in group root, which hidepid= exempts (proc(5)).
"""

import os
from pathlib import Path
from typing import Final

from luksrotd.ports import Caller

PROC: Final = Path("/proc")
#: What systemd calls the hierarchy that it keeps its units in where there are several (cgroups(7)).
_SYSTEMD_HIERARCHY: Final = "name=systemd"
_UNIT_SUFFIXES: Final = (".service", ".scope", ".socket", ".mount", ".swap")
_UNSET: Final = 2**32 - 1


def client_and_unit(pid: int, pidfd: int = -1, *, proc: Path = PROC) -> tuple[str, str]:
    """Name and unit of the process ``pid``; '' for what cannot be read, for it may be gone.  Blocks.

    With ``pidfd``, a descriptor of it: '' also if the number has gone to another process meanwhile.
    """
    found = _read(proc / str(pid) / "comm").rstrip("\n"), unit_of(_read(proc / str(pid) / "cgroup"))
    return ("", "") if pidfd >= 0 and _pid_of(pidfd, proc) != pid else found


def unit_of(cgroups: str) -> str:
    """The system's unit in /proc/PID/cgroup, as sd_pid_get_unit(3) does: the outermost, which users cannot make up.

    From the unified hierarchy, or on a hybrid or old system from the one called ``name=systemd``: whichever has one.
    """
    paths = {}
    for line in cgroups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths["unified"] = path
        elif _SYSTEMD_HIERARCHY in controllers.split(","):
            paths["systemd"] = path
    for hierarchy in ("unified", "systemd"):
        for part in paths.get(hierarchy, "").split("/"):
            if part.endswith(_UNIT_SUFFIXES):
                return part.removeprefix("_")  # systemd puts it before a name that the kernel might take for its own
    return ""


def myself(client: str = "", *, proc: Path = PROC) -> Caller:
    """This process as one who acts: its user is the one who logged in, also behind sudo(8), if the kernel knows."""
    name, unit = client_and_unit(os.getpid(), proc=proc)
    login = _read(proc / "self" / "loginuid").strip()
    uid = int(login) if login.isdecimal() and int(login) != _UNSET else os.getuid()
    return Caller("", uid, client=client or name, unit=unit)


def _pid_of(pidfd: int, proc: Path) -> int:
    """The number of the process, in /proc/self/fdinfo; -1 when it has ended, 0 when it cannot be read."""
    for line in _read(proc / "self" / "fdinfo" / str(pidfd)).splitlines():
        name, _, value = line.partition(":")
        if name == "Pid":
            return int(value)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""
