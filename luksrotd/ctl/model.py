# SPDX-License-Identifier: GPL-2.0-or-later
"""What luksrotctl asks, and what it is told: the same over the bus and without it."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from luksrotd.errors import LuksrotdError
from luksrotd.records import dataclass
from luksrotd.rotation.edits import Pbkdf

if TYPE_CHECKING:
    import asyncio

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
class Token:
    """A credential that a LUKS2 token gives: its number, or None for any that does; a descriptor of its PIN."""

    number: int | None
    pin: int | None = None


#: A descriptor to read it from, or a token to ask for it.
Credential = int | Token


@dataclass(frozen=True, slots=True)
class KeyRequest:
    """A change of a managed key; the secrets are descriptors to read from.

    ``verb``: enroll, rotate, stage, finish, abort, remove, set-data, adopt, release or recreate; what a verb has no
    use for stays as it is.  ``volume_key``: the credential is the volume key.  ``new`` is the new secret, or where one
    goes that is to be generated.  ``data`` of None keeps the associated data; ``pbkdf`` of None leaves the choice to
    luksrotd.  ``expires``: seconds until a staged key counts as forgotten, 0 for never, None as configured.
    ``generation``: only if that one is staged.  ``alone``: without the others of its set.  ``set``: the id of the set,
    None for the one that is under way.  ``keep``: what is staged on some stays if it fails on others.
    ``if_generation``: only if the header is at that sequence number.
    """

    verb: str
    name: str
    credential: Credential | None = None
    new: int | Delivery | None = None
    data: Mapping[str, Any] | None = None
    pbkdf: Pbkdf | None = None
    volume_key: bool = False
    keyslot: int | None = None
    expires: int | None = None
    generation: int | None = None
    alone: bool = False
    set: str | None = None
    keep: bool = False
    if_generation: int | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """What a verb would make of a key, on a header that is at sequence number ``seqid``."""

    seqid: int
    generation: int


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What became of a key; generation 0 and no keyslot: it is not managed any more."""

    name: str
    generation: int
    keyslot: int | None
    seqid_before: int
    seqid_after: int


@dataclass(frozen=True, slots=True)
class MemberChange:
    """What became of one volume of a set (``happened``: docs/dbus.md), and of its key if anything."""

    happened: str
    change: KeyChange | None = None
    error: LuksrotdError | None = None


@dataclass(frozen=True, slots=True)
class SetChange:
    """What became of a set of ``size`` volumes; ``state`` is None where a volume cannot be read."""

    name: str
    set: str
    size: int
    state: str | None
    members: Sequence[MemberChange]


@dataclass(frozen=True, slots=True)
class SetMember:
    """Where one volume of a set is; generation 0: it has no such key.  ``why``: what is odd."""

    uuid: str
    standing: str
    generation: int
    keyslot: int | None
    why: str


@dataclass(frozen=True, slots=True)
class SetStatus:
    """Where a set is, and what can be done with it; ``set`` of None: nothing was ever staged on it."""

    name: str
    set: str | None
    size: int | None
    state: str
    steps: Sequence[str]
    why: str
    members: Sequence[SetMember]


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

    async def change(self, device: Device, request: KeyRequest, progress: Progress) -> KeyChange:
        """Change a managed key of one volume."""

    async def plan(self, device: Device, verb: str, name: str) -> Planned:
        """What enroll, rotate or stage would do; raises the refusal that it would meet, as far as the header tells."""

    async def change_set(self, devices: Sequence[Device], request: KeyRequest, progress: Progress) -> SetChange:
        """Stage, finish or abort the same key on a set of volumes.

        An error that has kept it from being done on all of them is the error of a member, too.
        """

    async def set_status(self, devices: Sequence[Device], name: str, group: str | None) -> SetStatus:
        """Where a rotation in two steps stands; ``group``: the id of the set."""

    async def scrub(self, device: Device, progress: Progress, if_generation: int | None = None) -> int:
        """Overwrite all keyslot space that is not in use; bytes.  ``if_generation`` as of ``KeyRequest``."""

    async def verify(self, device: Device, name: str, credential: Credential) -> bool:
        """Whether the credential is the managed key ``name``."""

    async def reconcile(self, device: Device, *, dry_run: bool, retire_expired: bool = False) -> Reconciled:
        """Finish what a crash interrupted; ``retire_expired``: abort staged keys that have expired, too."""

    async def history(self, device: Device | None, since: int, limit: int) -> Sequence[Mapping[str, Any]]:
        """The newest ``limit`` records of what was done, of one volume or of all; ``since``: microseconds, UTC.

        Oldest first; their fields are in luksrotd(8).
        """

    def interrupt(self, task: "asyncio.Task[Any]") -> None:
        """The user wants ``task``, which runs one of the calls, to stop; called for every Ctrl-C."""

    async def close(self) -> None:
        """Let go of everything."""
