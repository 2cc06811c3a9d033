# SPDX-License-Identifier: GPL-2.0-or-later
"""Header backup and restore (docs/adr/0010-header-restore.md)."""

from collections.abc import Mapping

from luksrotd.errors import Conflict, FormatError, UnknownDevice
from luksrotd.ports import DeviceRef, HeaderFiles, Host, SecretSource
from luksrotd.records import dataclass
from luksrotd.rotation import restore
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import UNLOCK
from luksrotd.rotation.preview import Difference, restored
from luksrotd.rotation.restore import Backup
from luksrotd.rotation.view import DeviceView
from luksrotd.service import audit
from luksrotd.service.audit import Audit
from luksrotd.service.progress import Progress, ignore
from luksrotd.service.snapshot import Snapshot, all_areas
from luksrotd.service.threads import in_thread
from luksrotd.service.transaction import Basis, Committed, Transactor


@dataclass(frozen=True, slots=True)
class Saved:
    """A backup that was made: of which volume, how long in bytes, its sequence number and keyslots."""

    uuid: str
    size: int
    seqid: int
    keyslots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A backup beside a volume: what a restore would make of it.

    ``before``: the volume as it was compared, None if it has lost its header.  ``moved``: keyslots of the backup whose
    areas have to lie elsewhere than they did.
    """

    uuid: str
    backup: Backup
    before: DeviceView | None
    differences: tuple[Difference, ...]
    moved: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Restored:
    """A restore that was made; both sequence numbers are the same if there was nothing to do, the first 0 if lost."""

    uuid: str
    seqid_before: int
    seqid_after: int


class Headers:
    """The use cases, on the ports of ``host`` and on backup files."""

    def __init__(self, host: Host, files: HeaderFiles, transactor: Transactor | None = None) -> None:
        self._host = host
        self._audit = Audit(host)
        self._files = files
        self._transactor = transactor or Transactor(host)

    async def backup(self, ref: DeviceRef, path: str) -> Saved:
        """Write the header, and the areas that it names, into the new file ``path``; raises a refusal."""
        with self._audit.change(audit.BACKUP, ref, file=path) as account:
            snapshot = await self._transactor.read(ref, all_areas)
            seen = account.view = snapshot.view
            restore.check_backup(seen)
            content = restore.backup_image(seen, snapshot.areas)
            await in_thread(lambda: self._files.create(path, content, len(snapshot.pair.raw)))
            account.done(seen.uuid, seqid_after=seen.seqid)
        return Saved(seen.uuid, len(content), seen.seqid, tuple(sorted(seen.metadata.keyslots)))

    async def compare(self, ref: DeviceRef, path: str, *, force: bool = False) -> Comparison:
        """What a restore of the backup in ``path`` would do; raises the refusal that it would meet.

        ``force``: the device may have lost both copies of its header.
        """
        content = await in_thread(lambda: self._files.read(path, restore.BACKUP_MAX))
        backup = restore.read_backup(content)
        try:
            snapshot = await self._transactor.read(ref, all_areas)
        except (FormatError, UnknownDevice):
            if not force:
                raise
            raw = await self._transactor.read_lost(ref, *_size(backup))
            return _comparison(None, restore.prepare_lost(raw, backup), backup)
        return _comparison(snapshot.view, restore.prepare(snapshot.view, snapshot.areas, backup), backup)

    async def restore(
        self, ref: DeviceRef, compared: Comparison, secret: SecretSource | None = None, progress: Progress = ignore
    ) -> Restored:
        """Make the volume have the header of the backup.

        ``secret``: a key that must open the restored header, shown before anything is written.  Raises ``Conflict``
        if the volume is not any more what it was when it was compared.
        """
        secrets: Mapping[str, SecretSource] = {} if secret is None else {UNLOCK: secret}
        with self._audit.change(audit.RESTORE, ref, backup_seqid=compared.backup.view.seqid) as account:
            account.view = compared.before
            done = await self._run(ref, compared, secrets, account.progress(progress))
            account.change = done.change
            account.done(done.uuid, seqid_before=done.seqid_before, seqid_after=done.seqid_after)
        return Restored(done.uuid, done.seqid_before, done.seqid_after)

    async def _run(
        self, ref: DeviceRef, compared: Comparison, secrets: Mapping[str, SecretSource], progress: Progress
    ) -> Committed:
        backup, before, prove = compared.backup, compared.before, UNLOCK in secrets
        if before is None:

            def decide_lost(raw: bytes) -> Change:
                return restore.prepare_lost(raw, backup, prove=prove)

            return await self._transactor.revive(ref, decide_lost, secrets, _size(backup), progress)

        def decide(snapshot: Snapshot) -> Change:
            if not snapshot.pair.winner.same_content(before.pair.winner):
                raise Conflict(
                    "cannot restore the header: the volume has changed since it was compared with the backup"
                )
            return restore.prepare(snapshot.view, snapshot.areas, backup, prove=prove)

        return await self._transactor.run_on(ref, Basis(all_areas, decide), secrets, progress)


def _size(backup: Backup) -> tuple[int, int]:
    """Bytes of the header area, and of both copies."""
    return backup.view.pair.length, len(backup.view.pair.raw)


def _comparison(before: DeviceView | None, change: Change, backup: Backup) -> Comparison:
    if change.start is None:
        return Comparison(backup.view.uuid, backup, before, (), ())
    slots, now = backup.view.metadata.keyslots, change.start.metadata.keyslots
    moved = tuple(number for number in sorted(slots) if slots[number].area != now[number].area)
    return Comparison(backup.view.uuid, backup, before, restored(before, change, change.start), moved)
