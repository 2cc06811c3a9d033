# SPDX-License-Identifier: GPL-2.0-or-later
"""How much memory this process may use: what its control groups allow, or the machine has (cgroups(7), proc(5))."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from luksrotd.records import dataclass

#: Files with a limit in bytes, by the version of the control group; memory.high slows down to a standstill.
_LIMITS: Final = {"cgroup2": ("memory.max", "memory.high"), "cgroup": ("memory.limit_in_bytes",)}


def available_kib(root: Path = Path("/")) -> int:
    """KiB that this process, and those that it starts, may use; ``root`` is where proc and the rest are mounted.

    What cannot be read limits nothing; 0 if not even the machine's memory is known.
    """
    limits = [limit for group in _groups(root) for limit in _limits_of(group)]
    return min([limit // 1024 for limit in limits] + [total for total in (_total_kib(root),) if total], default=0)


@dataclass(frozen=True, slots=True)
class _Mount:
    """A hierarchy of control groups: the part of it from ``group`` on is at ``point``."""

    kind: str
    group: str
    point: str
    options: frozenset[str]


def _groups(root: Path) -> Iterator[tuple[str, Path]]:
    """Kind and directory of each group that limits this process, up to the topmost that can be seen."""
    mounts = list(_mounts(root))
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        for mount in mounts:
            if mount.kind == "cgroup2" if number == "0" else "memory" in {*controllers.split(",")} & mount.options:
                top = root / mount.point.lstrip("/")
                inside = _inside(path, mount.group)
                for part in (inside, *inside.parents):
                    yield mount.kind, top / part
                break


def _mounts(root: Path) -> Iterator[_Mount]:
    for line in _lines(root / "proc/self/mountinfo"):
        where, _, what = line.partition(" - ")
        match where.split(), what.split():
            case [_, _, _, group, point, *_], [kind, _, options] if kind in _LIMITS:
                yield _Mount(kind, _plain(group), _plain(point), frozenset(options.split(",")))


def _inside(path: str, group: str) -> Path:
    """Where ``path`` is below a mount that shows ``group``; its top for what lies elsewhere (another namespace's)."""
    if group == "/":
        below = path
    elif path == group or path.startswith(group + "/"):
        below = path[len(group) :]
    else:
        below = ""
    inside = Path(below.lstrip("/"))
    return Path() if ".." in inside.parts else inside


def _plain(escaped: str) -> str:
    r"""A path of mountinfo: \040 is a space there."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), escaped)


def _limits_of(group: tuple[str, Path]) -> Iterator[int]:
    kind, directory = group
    for name in _LIMITS[kind]:
        for line in _lines(directory / name):
            if line.isdecimal():  # else "max"
                yield int(line)


def _total_kib(root: Path) -> int:
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemTotal":
            return int(value.split()[0])
    return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
