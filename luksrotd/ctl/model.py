# SPDX-License-Identifier: GPL-2.0-or-later
"""What luksrotctl asks, and what it is told: the same over the bus and without it."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from luksrotd.rotation.edits import Pbkdf

#: Called with the name of each stage that an operation enters (docs/spec/commit-protocol.md has the phases).
Progress = Callable[[str], None]


class Delivery(Protocol):
    """Where a generated key goes."""

    def check(self) -> None:
        """Raise ``SecretRejected`` if it is plain already that the key cannot be delivered."""

    def deliver(self, key: int) -> None:
        """Make the key safe that the memfd ``key`` holds; raises ``SecretRejected``."""

    def forget(self) -> None:
        """The key opens nothing after all."""


@dataclass(frozen=True, slots=True)
class Device:
    """A volume as the user named it: a path, or ``UUID=…``; ``header`` is the path of a detached header."""

    name: str
    header: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be; ``action`` is ``repair``, ``person`` or ``note``.

    ``tokens``, ``keyslots``, ``name`` (of the key) and ``since`` (UTC): what it is about; None where nobody can tell.
    """

    code: str
    action: str
    message: str
    tokens: Sequence[int] | None = None
    keyslots: Sequence[int] | None = None
    name: str | None = None
    since: str | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """What becomes of one object of a volume (``rotation.preview.Difference``)."""

    what: str
    name: str
    how: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Key:
    """A managed key; ``data`` is None where it was not asked for or may not be read.

    Of a staged key: ``expires_at`` ('' for never), and ``set`` and ``set_size``, the set of volumes that it was staged
    on ('' and 0 for none, and where nobody can tell).
    """

    token: int
    name: str
    generation: int
    state: str
    keyslot: int | None
    rotated_at: str
    wipe_pending: bool
    changed: bool
    data: Mapping[str, Any] | None = None
    expires_at: str = ""
    set: str = ""
    set_size: int = 0


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume; ``seqid`` is the LUKS sequence number, ``tokens`` are the types of all tokens by number.

    ``busy`` is None where nobody can tell.
    """

    device: str
    uuid: str
    label: str
    seqid: int
    keys: Sequence[Key]
    keyslots: Sequence[int]
    ordinary_keyslots: Sequence[int]
    tokens: Mapping[int, str]
    problems: Sequence[Finding]
    busy: bool | None = None


@dataclass(frozen=True, slots=True)
class KeyRequest:
    """An enrolment or a rotation; the secrets are descriptors to read from.

    ``new`` is the new secret, or where one goes that is to be generated.  ``data`` of None keeps the associated data;
    ``pbkdf`` of None leaves the choice to luksrotd.
    """

    name: str
    credential: int
    new: int | Delivery
    data: Mapping[str, Any] | None
    pbkdf: Pbkdf | None


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What became of a key; generation 0 and no keyslot: it is not managed any more."""

    name: str
    generation: int
    keyslot: int | None
    seqid_before: int
    seqid_after: int


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What was found on a volume, and what is left of it now.

    ``differences``: what was changed, or would be; None where nobody can tell.
    """

    found: Sequence[Finding]
    left: Sequence[Finding]
    differences: Sequence[Difference] | None = None

    @property
    def repaired(self) -> Sequence[Finding]:
        """What was found and is gone."""
        return [finding for finding in self.found if finding not in self.left]


class Backend(Protocol):
    """luksrotd, by whatever way it is reached.  Every call raises ``LuksrotdError``."""

    async def devices(self) -> Sequence[Device]:
        """All volumes of the machine."""

    async def volume(self, device: Device, *, data: bool) -> Volume:
        """One volume, with the associated data of its keys if ``data``."""

    async def enroll(self, device: Device, request: KeyRequest, progress: Progress) -> KeyChange:
        """Give the volume a managed key."""

    async def rotate(self, device: Device, request: KeyRequest, progress: Progress) -> KeyChange:
        """Replace a managed key."""

    async def verify(self, device: Device, name: str, credential: int) -> bool:
        """Whether the credential is the managed key ``name``."""

    async def reconcile(self, device: Device, *, dry_run: bool, retire_expired: bool = False) -> Reconciled:
        """Finish what a crash interrupted; ``retire_expired``: abort staged keys that have expired, too."""

    def interrupt(self, task: asyncio.Task[Any]) -> None:
        """The user wants ``task``, which runs one of the calls, to stop; called for every Ctrl-C."""

    async def close(self) -> None:
        """Let go of everything."""
