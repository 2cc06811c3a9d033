# SPDX-License-Identifier: GPL-2.0-or-later
"""The values that luksrotd.conf(5) can give: each reader takes the text and raises ``ValueError``.  Pure."""

import re
from collections.abc import Callable, Mapping
from typing import Final

from luksrotd.config import RULE_KINDS, Rule
from luksrotd.rotation.edits import PBKDF_TYPES

_UNITS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("", "s", "sec", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 24 * 3600),
    **dict.fromkeys(("w", "week", "weeks"), 7 * 24 * 3600),
    **dict.fromkeys(("M", "month", "months"), 2_629_800),
    **dict.fromkeys(("y", "year", "years"), 31_557_600),
}
"""Seconds; systemd.time(7), of which luksrotd takes whole numbers only."""
_SIZES: Final[Mapping[str, int]] = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_BOOLEANS: Final[Mapping[str, bool]] = {
    **dict.fromkeys(("1", "yes", "y", "true", "t", "on"), True),
    **dict.fromkeys(("0", "no", "n", "false", "f", "off"), False),
}
_MAX_SECONDS: Final = 100 * 31_557_600


def rule(word: str) -> Rule:
    """``kind:pattern``."""
    kind, _, pattern = word.partition(":")
    if kind not in RULE_KINDS or not pattern:
        raise ValueError(f"a rule is {', '.join(f'{name}:PATTERN' for name in RULE_KINDS[:-1])} or bus:PATTERN")
    return Rule(kind, pattern)


def integer(least: int, most: int) -> Callable[[str], int]:
    """Reads a whole number from ``least`` to ``most``."""

    def read(value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,15}", value) or not least <= int(value) <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return int(value)

    return read


def size_in_kib(least: int, most: int) -> Callable[[str], int]:
    """Reads a size, from ``least`` to ``most`` KiB, as of systemd: bytes, or with a suffix to the base of 1024."""

    def read(value: str) -> int:
        found = re.fullmatch(r"([0-9]{1,15})([KMGT]?)", value)
        kib = int(found[1]) * _SIZES[found[2]] // 1024 if found else -1
        if not least <= kib <= most:
            raise ValueError(f"must be a size in bytes, or with K, M, G or T, from {least}K to {most}K")
        return kib

    return read


def span(value: str) -> int:
    """Seconds of a span of time."""
    seconds = 0
    for word in re.findall(r"[0-9]+ *[A-Za-z]*|[^ ]", value):
        found = re.fullmatch(r"([0-9]{1,15}) *([A-Za-z]*)", word)
        if found is None or found[2] not in _UNITS:
            raise ValueError("must be a span of time such as 90, 5min or 2h 30min")
        seconds += int(found[1]) * _UNITS[found[2]]
    if not 1 <= seconds <= _MAX_SECONDS:
        raise ValueError("must be from a second to a hundred years")
    return seconds


def seconds_of(value: str) -> float:
    """The same, as a number to calculate with."""
    return float(span(value))


def span_or_never(value: str) -> int | None:
    """The same, or None for never."""
    return None if value in ("never", "infinity") else span(value)


def boolean(value: str) -> bool:
    """Whatever systemd takes for one."""
    if value.lower() not in _BOOLEANS:
        raise ValueError("must be yes or no")
    return _BOOLEANS[value.lower()]


def pbkdf_type(value: str) -> str:
    """A key derivation that libcryptsetup has."""
    if value not in PBKDF_TYPES:
        raise ValueError(f"must be one of {', '.join(PBKDF_TYPES)}")
    return value


def absolute_path(value: str) -> str:
    """A path that needs no directory to start from."""
    if not value.startswith("/") or ".." in value.split("/"):
        raise ValueError("must be an absolute path without '..'")
    return value
