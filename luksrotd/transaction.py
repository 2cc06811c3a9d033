# SPDX-License-Identifier: GPL-2.0-or-later
"""LUKS2 transactions for programs: any mix of keyslots and tokens in one commit, or nothing (docs/api.md).

::

    async with transaction.begin("/dev/sda2") as tx:
        await tx.unlock(Path("/etc/keys/admin.key"))
        keyslot = tx.add_keyslot(Path("/run/keys/new.key"))
        tx.set_token({"type": "example", "keyslots": [str(keyslot)]})
        tx.remove_token(3)
        tx.destroy_keyslot(1)
        for difference in tx.plan():
            print(difference)
        await tx.commit()

Until ``commit`` nothing is written, and nothing is locked.  A block that is left without it leaves the volume as it
was.  Everything that is raised is in ``luksrotd.errors``; its ``outcome`` says what is true of the volume then.

No daemon is needed; the same locks are taken as by luksrotd and cryptsetup.  For a block device one must be root.
"""

import copy
import os
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

from luksrotd import direct, errors
from luksrotd.errors import InvalidRequest, Outcome, SecretRejected
from luksrotd.host.sealed import SecretMemfd
from luksrotd.ports import DeviceRef, SecretFd
from luksrotd.rotation.edits import PBKDF_FOR_RANDOM_KEYS, UNLOCK, VOLUME_KEY, Pbkdf
from luksrotd.rotation.preview import Difference
from luksrotd.service import draft
from luksrotd.service.draft import OpenTransaction
from luksrotd.service.progress import Progress, ignore
from luksrotd.service.threads import in_thread
from luksrotd.service.transaction import Committed

__all__ = [
    "PBKDF_FOR_RANDOM_KEYS",
    "Committed",
    "Difference",
    "Outcome",
    "Pbkdf",
    "Secret",
    "Transaction",
    "begin",
    "errors",
]

#: A key file, a descriptor of one, or the secret itself.  A file is taken whole, a newline at its end too, as
#: ``cryptsetup --key-file`` does; up to 8 MiB.  Path and descriptor must be of a file, memfd or block device, which can
#: be read twice; the descriptor stays the caller's.  Of ``bytes`` a copy goes into a sealed memfd at once, but the
#: object itself can never be wiped from this process: prefer a path, a descriptor, or a ``bytearray``, which is zeroed.
Secret = Path | int | bytes | bytearray

_OPEN: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


@asynccontextmanager
async def begin(
    device: str | os.PathLike[str] | None = None,
    *,
    header: str | os.PathLike[str] | None = None,
    uuid: str | None = None,
) -> AsyncIterator["Transaction"]:
    """A transaction on the volume in ``device`` (block device or image), or on the block device with the LUKS ``uuid``.

    ``header``: block device or file with the detached header.  With ``device`` and ``uuid`` the volume that is found
    must have that UUID.  Raises ``UnknownDevice``, ``NotLuks2``, ``FormatError``, ``DeviceError``; and at once what
    would refuse any commit: ``RequirementsPresent``, ``ForeignSignature``, ``NeedsReconcile`` (luksrotctl(1)).
    """
    ref = await in_thread(lambda: _ref(device, header, uuid))
    opened = await draft.begin(direct.caller_host(), ref)
    with ExitStack() as secrets:
        transaction = Transaction(opened, secrets)
        try:
            yield transaction
        finally:
            transaction.abort()


class Transaction:
    """Edits of one volume, made by one ``commit`` or not at all; ``begin`` gives it.

    Numbers of keyslots and tokens are 0 … 31.  Those of what is added are given out at once, the lowest free one
    unless the caller names one; what goes keeps its number until after the commit.  An edit that is wrong in itself is
    refused when it is queued, with ``InvalidRequest`` or ``NoFreeKeyslot``; what is wrong with all of them together,
    by ``plan`` and ``commit``.
    """

    def __init__(self, opened: OpenTransaction, secrets: ExitStack) -> None:
        """For ``begin``; ``secrets`` closes what the transaction has opened."""
        self._opened = opened
        self._resources = secrets
        self._sources: dict[str, SecretFd] = {}

    @property
    def uuid(self) -> str:
        """The LUKS UUID of the volume."""
        return self._opened.view.uuid

    @property
    def metadata(self) -> dict[str, Any]:
        """A copy of the JSON metadata as it was at the beginning (LUKS2 specification, section 3)."""
        return copy.deepcopy(dict(self._opened.view.metadata.raw))

    async def unlock(self, secret: Secret, *, volume_key: bool = False) -> None:
        """Show a credential: a passphrase, or with ``volume_key`` the volume key itself.

        Needed before the commit of a transaction that adds or removes keyslots, at any time before it.  Where keyslots
        only go, it must be the passphrase of one that stays.  Tokens alone need none.  Raises ``WrongCredential`` at
        once if it does not open the volume, ``SecretRejected`` if it cannot be read; another one can be tried then.
        """
        self._opened.check_open()
        with ExitStack() as attempt:
            source = _source(secret, attempt)
            await self._opened.check_credential(source, volume_key=volume_key)
            self._resources.enter_context(attempt.pop_all())
        for name in (UNLOCK, VOLUME_KEY):
            self._sources.pop(name, None)
        self._sources[VOLUME_KEY if volume_key else UNLOCK] = source

    def add_keyslot(self, secret: Secret, *, pbkdf: Pbkdf | None = None, keyslot: int | None = None) -> int:
        """A new keyslot that ``secret`` opens; its number.

        ``pbkdf``: the key derivation, libcryptsetup's default argon2id if there is none; ``PBKDF_FOR_RANDOM_KEYS`` for
        a secret of 256 random bits.
        """
        self._opened.check_open()
        source = _source(secret, self._resources)
        name = f"new-{len(self._opened.draft.secrets)}"
        number = self._opened.draft.add_keyslot(name, pbkdf or Pbkdf(), keyslot)
        self._sources[name] = source
        return number

    def set_token(self, body: Mapping[str, Any], *, token: int | None = None) -> int:
        """Write a token, a new one or in place of the one of that number; its number.

        ``body`` is the whole JSON object, with ``type`` and ``keyslots`` (decimal strings; those that are added in this
        transaction can be named).  Tokens of luksrotd's own types are not for this: managed keys have their verbs.
        """
        self._opened.check_open()
        return self._opened.draft.set_token(body, token)

    def remove_token(self, token: int) -> None:
        """Remove the token of that number, or take a new one back; of a managed key only together with its keyslot."""
        self._opened.check_open()
        self._opened.draft.remove_token(token)

    def destroy_keyslot(self, keyslot: int) -> None:
        """Remove the keyslot of that number and overwrite its area.

        Tokens that name it must go, too, or be written anew.
        """
        self._opened.check_open()
        self._opened.draft.destroy_keyslot(keyslot)

    def plan(self) -> tuple[Difference, ...]:
        """What the commit would do: keyslots, then tokens, then wiped areas.

        Raises the refusal that the commit would meet, as far as the header tells: ``InvalidRequest``, ``LastKeyslot``,
        ``NoFreeArea``, ``NoFreeKeyslot``, ``MetadataFull``, ``NeedsPerson``.
        """
        return self._opened.plan()

    async def commit(self, progress: Progress = ignore) -> Committed:
        """Make all edits in one commit; the LUKS UUID and the sequence numbers before and after it.

        First everything is made on a shadow in memory and verified there.  Then the header must still be, byte for
        byte, what it was at the beginning: else ``Conflict``, and nothing is written.  From the first header write on
        it cannot be cancelled any more; after a power cut at any write the volume is as before or as after, and
        luksrotctl(1) ``reconcile`` finishes what is owed.  ``progress`` is called with the name of each step.

        A refusal of the edits (see ``plan``) leaves the transaction open; all else ends it.
        """
        return await self._opened.commit(self._sources, progress)

    def abort(self) -> None:
        """Drop it; nothing has been written.  Leaving the block does the same.  Idempotent."""
        self._opened.abort()


def _ref(device: str | os.PathLike[str] | None, header: str | os.PathLike[str] | None, uuid: str | None) -> DeviceRef:
    if device is None and uuid is None:
        raise InvalidRequest("cannot begin a transaction: name a device or a UUID")
    path = direct.node_of(uuid or "") if device is None else os.fspath(device)
    ref = direct.device_ref(path, None if header is None else os.fspath(header))
    return DeviceRef(ref.path, ref.header, uuid and uuid.lower())


def _source(secret: Secret, resources: ExitStack) -> SecretFd:
    """A descriptor, open as long as ``resources``; raises ``SecretRejected`` and ``InvalidRequest``."""
    if isinstance(secret, bytes | bytearray):
        taken = secret if isinstance(secret, bytearray) else bytearray(secret)
        return SecretFd(resources.enter_context(SecretMemfd.from_bytes(taken)).fd)
    if isinstance(secret, bool) or not isinstance(secret, int | os.PathLike):
        # A text would be anybody's guess: a path, or a passphrase that nothing can wipe?
        raise InvalidRequest("cannot use a secret: it must be a Path, a file descriptor, bytes or a bytearray")
    name = f"descriptor {secret}" if isinstance(secret, int) else os.fspath(secret)
    try:
        fd = os.dup(secret) if isinstance(secret, int) else os.open(secret, _OPEN)
        resources.callback(os.close, fd)
        mode = os.fstat(fd).st_mode
    except (OSError, ValueError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else "there can be none"
        raise SecretRejected(f"cannot open a secret from {name}: {why}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise SecretRejected(f"cannot use a secret from {name}: it is no file or block device, so cannot be read twice")
    return SecretFd(fd)
