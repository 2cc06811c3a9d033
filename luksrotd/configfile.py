# SPDX-License-Identifier: GPL-2.0-or-later
"""The text of luksrotd.conf(5) and its drop-ins, as a ``Config``.  Pure.

The syntax is that of systemd's files (systemd.syntax(7)): sections, ``Key=Value``, comments after ``#`` or ``;`` at the
start of a line, a backslash at the end of one that goes on in the next.  A list takes several words and adds to what is
there, an empty assignment takes back what was assigned before, later files win.

What is not known is left aside with a warning, so that one file serves several versions.  All else that is wrong is an
error: a rule that denies a device must not vanish because of a slip in its line.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from typing import Any, Final, NoReturn

from luksrotd.config import Config, DeviceRules, KeyDerivation, Limits, ManagedVolume, Rule, Staged
from luksrotd.configvalues import (
    absolute_path,
    boolean,
    integer,
    pbkdf_type,
    rule,
    seconds_of,
    size_in_kib,
    span_or_never,
)
from luksrotd.errors import ConfigError, InvalidRequest
from luksrotd.records import dataclass
from luksrotd.rotation.edits import MAX_MEMORY_KIB, MAX_PARALLEL, MIN_MEMORY_KIB, Pbkdf

_BLANK: Final = " \t\r"
_COMMENT: Final = (b"#", b";")
_SHOWN: Final = 60
"""Characters of a bad value that a message repeats."""
_MAX_COUNT: Final = 10_000


@dataclass(frozen=True, slots=True)
class ConfigText:
    """One file: its path, for messages, and what is in it."""

    path: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Parsed:
    """What the files say, and what was left aside in them: "FILE:LINE: …"."""

    config: Config
    warnings: tuple[str, ...] = ()


def parse(files: Sequence[ConfigText]) -> Parsed:
    """What ``files`` say, the last of them overriding the others; raises ``ConfigError``, with file and line."""
    draft = _Draft()
    for file in files:
        section = ""
        for where, line in _lines(file):
            if line.startswith("["):
                section = _section(draft, where, line)
            else:
                _assign(draft, where, section, line)
    return Parsed(draft.finish(), tuple(draft.warnings))


# -- lines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    path: str
    number: int

    def refuse(self, reason: str) -> NoReturn:
        raise ConfigError(f"cannot use the configuration: {self}: {reason}")

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"


def _lines(file: ConfigText) -> list[tuple[_Place, str]]:
    """The lines that say something, joined where they go on, each with the number of its first one."""
    found: list[tuple[_Place, str]] = []
    begun: tuple[_Place, str] | None = None
    for number, raw in enumerate(file.content.split(b"\n"), 1):
        raw = raw.strip(_BLANK.encode())
        if raw.startswith(_COMMENT):
            continue
        here = _Place(file.path, number)
        place, before = begun or (here, "")
        text = before + _text(here, raw)
        if text.endswith("\\"):
            begun = (place, text[:-1].rstrip(_BLANK) + " ")
            continue
        begun = None
        found.append((place, text.strip(_BLANK)))
    if begun is not None:
        found.append((begun[0], begun[1].strip(_BLANK)))
    return [(place, text) for place, text in found if text]


def _text(where: _Place, raw: bytes) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        where.refuse("not UTF-8")
    if not text.replace("\t", " ").isprintable():
        where.refuse("a control character")
    return text


def _section(draft: "_Draft", where: _Place, line: str) -> str:
    if not line.endswith("]"):
        where.refuse("a section must end with ']'")
    name = line[1:-1]
    if name == "Volume":
        draft.volumes.append(_VolumeDraft(where))
    elif name not in _KEYS:
        draft.warnings.append(f"{where}: unknown section [{_short(name)}], ignored")
    return name


def _assign(draft: "_Draft", where: _Place, section: str, line: str) -> None:
    key, equals, value = (part.strip() for part in line.partition("="))
    if not equals:
        where.refuse(f"neither a section nor an assignment: {_short(line)}")
    if not section:
        where.refuse(f"{_short(key)} stands before the first section")
    keys = _KEYS.get(section)
    if keys is None:
        return
    if key not in keys:
        draft.warnings.append(f"{where}: unknown key {_short(key)} in [{section}], ignored")
        return
    try:
        keys[key](draft, where, value)
    except ValueError as error:
        where.refuse(f"{key}={_short(value)}: {error}")


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


# -- what is said --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _VolumeDraft:
    where: _Place
    path: str | None = None
    header: str | None = None


@dataclass(slots=True)
class _Draft:
    """What the lines until now say; of a group of scalars the values that were given."""

    rules: dict[str, list[Rule]] = field(default_factory=lambda: {"Allow": [], "Deny": []})
    volumes: list[_VolumeDraft] = field(default_factory=list)
    limits: dict[str, Any] = field(default_factory=dict)
    key_derivation: dict[str, Any] = field(default_factory=dict)
    derivation_where: _Place | None = None
    staged: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def finish(self) -> Config:
        """All of it; raises ``ConfigError`` for what does not fit together."""
        volumes: dict[str, ManagedVolume] = {}
        for volume in self.volumes:
            if volume.path is None:
                volume.where.refuse("a [Volume] without Path=")
            volumes[volume.path] = ManagedVolume(volume.path, volume.header)
        if self.derivation_where is not None:
            try:
                Pbkdf(**self.key_derivation)
            except InvalidRequest as error:
                self.derivation_where.refuse(error.message)
        return Config(
            devices=DeviceRules(allow=tuple(self.rules["Allow"]), deny=tuple(self.rules["Deny"])),
            volumes=tuple(volumes.values()),
            limits=replace(Limits(), **self.limits),
            key_derivation=replace(KeyDerivation(), **self.key_derivation),
            staged=replace(Staged(), **self.staged),
        )


_Setter = Callable[[_Draft, _Place, str], None]
_Reader = Callable[[str], Any]


def _rules(which: str) -> _Setter:
    def assign(draft: _Draft, _: _Place, value: str) -> None:
        if not value:
            draft.rules[which].clear()
        draft.rules[which].extend(rule(word) for word in value.split())

    return assign


def _volume(name: str) -> _Setter:
    def assign(draft: _Draft, _: _Place, value: str) -> None:
        setattr(draft.volumes[-1], name, absolute_path(value) if value else None)

    return assign


def _limit(read: _Reader, name: str) -> _Setter:
    return lambda draft, _, value: _put(draft.limits, name, read, value)


def _memory_max(draft: _Draft, _: _Place, value: str) -> None:
    draft.limits.pop("memory_kib", None)
    draft.limits.pop("memory_percent", None)
    if value.endswith("%"):
        _put(draft.limits, "memory_percent", integer(1, 100), value[:-1])
    else:
        _put(draft.limits, "memory_kib", size_in_kib(MIN_MEMORY_KIB, 1 << 40), value)


def _derivation(read: _Reader, name: str) -> _Setter:
    def assign(draft: _Draft, where: _Place, value: str) -> None:
        _put(draft.key_derivation, name, read, value)
        draft.derivation_where = where

    return assign


def _staging(read: _Reader, name: str) -> _Setter:
    return lambda draft, _, value: _put(draft.staged, name, read, value)


def _put(values: dict[str, Any], name: str, read: _Reader, value: str) -> None:
    values.pop(name, None)
    if value:
        values[name] = read(value)


_COUNT: Final = integer(1, _MAX_COUNT)
_KEYS: Final[Mapping[str, Mapping[str, _Setter]]] = {
    "Devices": {"Allow": _rules("Allow"), "Deny": _rules("Deny")},
    "Volume": {"Path": _volume("path"), "Header": _volume("header")},
    "Limits": {
        "Jobs": _limit(_COUNT, "jobs"),
        "MemoryMax": _memory_max,
        "WaitingJobs": _limit(_COUNT, "waiting"),
        "WaitingJobsPerVolume": _limit(_COUNT, "waiting_per_volume"),
        "JobsPerUser": _limit(_COUNT, "jobs_per_user"),
        "Transactions": _limit(_COUNT, "transactions"),
        "TransactionsPerUser": _limit(_COUNT, "transactions_per_user"),
        "TransactionTimeoutSec": _limit(seconds_of, "transaction_seconds"),
    },
    "KeyDerivation": {
        "Type": _derivation(pbkdf_type, "type"),
        "Iterations": _derivation(integer(1, 2**32 - 1), "iterations"),
        "Memory": _derivation(size_in_kib(MIN_MEMORY_KIB, MAX_MEMORY_KIB), "memory_kib"),
        "Parallel": _derivation(integer(1, MAX_PARALLEL), "parallel"),
    },
    "Staged": {
        "Expire": _staging(span_or_never, "expires_seconds"),
        "RetireExpired": _staging(boolean, "retire_expired"),
    },
}
#: Every key that there is, by section: for who documents them.
KEYS: Final[Mapping[str, tuple[str, ...]]] = {section: tuple(keys) for section, keys in _KEYS.items()}
