# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel tells of a process: its memory, how often it was woken, how long it ran."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: all pages that a process has, and its share (what it shares with n others counts as one n-th)."""

    rss: int = 0
    pss: int = 0

    def __add__(self, other: Self) -> "Memory":
        return Memory(self.rss + other.rss, self.pss + other.pss)


@dataclass(frozen=True, slots=True)
class Activity:
    """Of a thread, or of several: how often it went to sleep, and seconds on a processor.

    Who goes to sleep has been woken before; that a thread had to leave the processor to another one is no wake-up.
    """

    sleeps: float = 0
    seconds: float = 0.0

    def over(self, seconds: float) -> "Activity":
        """In one of so many seconds."""
        return Activity(self.sleeps / seconds, self.seconds / seconds)

    def __sub__(self, other: Self) -> "Activity":
        return Activity(self.sleeps - other.sleeps, self.seconds - other.seconds)

    def __add__(self, other: Self) -> "Activity":
        return Activity(self.sleeps + other.sleeps, self.seconds + other.seconds)


def memory_of(*pids: int) -> Memory:
    """Of these processes together, now."""
    return sum((parsed_memory(Path(f"/proc/{pid}/smaps_rollup").read_text()) for pid in pids), Memory())


def threads_of(*pids: int) -> dict[int, Activity]:
    """Of each thread of these processes, by its number, until now."""
    found = {}
    for path in (path for pid in pids for path in Path(f"/proc/{pid}/task").iterdir()):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ends meanwhile
            texts = path.joinpath("status").read_text(), path.joinpath("schedstat").read_text()
            found[int(path.name)] = parsed_activity(*texts)
    return found


def between(before: Mapping[int, Activity], after: Mapping[int, Activity]) -> Activity:
    """Of all threads together, in the time between; not of those that have ended in it."""
    return sum((activity - before.get(thread, Activity()) for thread, activity in after.items()), Activity())


def children_of(pid: int) -> list[int]:
    """Processes that it has started."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]


def parsed_memory(rollup: str) -> Memory:
    """Of the text of smaps_rollup, proc(5)."""
    fields = _fields(rollup)
    return Memory(fields["Rss"] * 1024, fields["Pss"] * 1024)


def parsed_activity(status: str, schedstat: str) -> Activity:
    """Of the texts of status and schedstat of a thread."""
    return Activity(_fields(status)["voluntary_ctxt_switches"], int(schedstat.split(maxsplit=1)[0]) / 1e9)


def _fields(text: str) -> dict[str, int]:
    """Lines of a name, a colon, a number, and maybe a unit; others have no number."""
    lines = (line.partition(":") for line in text.splitlines())
    values = {name: rest.split() for name, _, rest in lines}
    return {name: int(words[0]) for name, words in values.items() if words and words[0].isdecimal()}
