# SPDX-License-Identifier: GPL-2.0-or-later
"""What luksrotd.conf(5) can say, and what holds where it says nothing.  Pure."""

from collections.abc import Sequence
from dataclasses import field
from fnmatch import fnmatchcase
from typing import Final

from luksrotd.records import dataclass

#: What a rule can look at: the LUKS UUID, a link under /dev/disk/by-id, udev's ID_BUS.
RULE_KINDS: Final = ("uuid", "id", "bus")


@dataclass(frozen=True, slots=True)
class Rule:
    """Matches devices: ``pattern`` as of fnmatch(3), held against what ``kind`` names."""

    kind: str
    pattern: str

    def matches(self, uuid: str, links: Sequence[str], bus: str) -> bool:
        """Whether a volume with that UUID, on a device with those links and that bus, is meant."""
        subjects = {"uuid": (uuid,), "id": tuple(link.rpartition("/")[2] for link in links), "bus": (bus,)}
        return any(fnmatchcase(subject.lower(), self.pattern.lower()) for subject in subjects[self.kind])


@dataclass(frozen=True, slots=True)
class DeviceRules:
    """Which volumes are managed: those that no ``deny`` matches and, if there is any ``allow``, one of those does."""

    allow: tuple[Rule, ...] = ()
    deny: tuple[Rule, ...] = ()

    def admit(self, uuid: str, links: Sequence[str], bus: str) -> bool:
        """Whether a volume with that UUID, on a device with those links and that bus, is managed."""
        if any(rule.matches(uuid, links, bus) for rule in self.deny):
            return False
        return not self.allow or any(rule.matches(uuid, links, bus) for rule in self.allow)


@dataclass(frozen=True, slots=True)
class ManagedVolume:
    """A volume that udev does not show: an image file, or a device whose header is detached.  Absolute paths."""

    path: str
    header: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is done at once.

    ``memory_kib``: for all key derivations together; None for ``memory_percent`` of what the control group, or the
    machine, has.  ``jobs_per_user`` and ``transactions_per_user`` bound everybody but root.
    """

    jobs: int = 4
    memory_kib: int | None = None
    memory_percent: int = 75
    waiting: int = 64
    waiting_per_volume: int = 4
    jobs_per_user: int = 8
    transactions: int = 64
    transactions_per_user: int = 8
    transaction_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class KeyDerivation:
    """For new keyslots whose caller does not say; what is None is libcryptsetup's default.  Memory in KiB."""

    type: str | None = None
    iterations: int | None = None
    memory_kib: int | None = None
    parallel: int | None = None


@dataclass(frozen=True, slots=True)
class Staged:
    """How long a staged key waits before it counts as forgotten (None: for ever), and whether it is then aborted."""

    expires_seconds: int | None = 30 * 24 * 3600
    retire_expired: bool = False


@dataclass(frozen=True, slots=True)
class Config:
    """All of it."""

    devices: DeviceRules = field(default_factory=DeviceRules)
    volumes: tuple[ManagedVolume, ...] = ()
    limits: Limits = field(default_factory=Limits)
    key_derivation: KeyDerivation = field(default_factory=KeyDerivation)
    staged: Staged = field(default_factory=Staged)
