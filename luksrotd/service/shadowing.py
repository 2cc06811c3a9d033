# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens on a shadow of the header: libcryptsetup's edits, their verification, its own recovery."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from luksrotd.errors import Conflict, ConsistencyError, InvalidRequest, LastKeyslot, NeedsPerson, WrongCredential
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import Which
from luksrotd.ports import EngineSession, Host, SecretSource, Shadow
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import UNLOCK
from luksrotd.rotation.plan import ShadowResult
from luksrotd.service.progress import Progress, Stage
from luksrotd.service.snapshot import Snapshot


class Workbench:
    """A shadow and a worker on it, for one operation; the shadow can be filled again and again."""

    def __init__(self, shadow: Shadow, session: EngineSession) -> None:
        self.shadow = shadow
        self.session = session

    def fill(self, snapshot: Snapshot) -> None:
        """Make the shadow what the device was; raises ``Conflict`` if it is of another size by now."""
        if self.shadow.length != snapshot.pair.length:
            raise Conflict("cannot go on: the size of the header has changed meanwhile")
        self.shadow.clear()
        self.shadow.write(0, snapshot.pair.raw)
        for area, content in snapshot.areas.items():
            self.shadow.write(area.offset, content)

    async def edit(
        self, base: Snapshot, change: Change, progress: Progress, *, volume_key: bool = False
    ) -> ShadowResult:
        """Let libcryptsetup make the edits on a shadow of ``base``, and verify them there."""
        progress(Stage.DERIVING)
        self.fill(base)
        await self._load_same(base)
        if change.needs_unlock:
            await unlock(self.session, change, volume_key=volume_key)
        await self.session.apply(change.edits)
        progress(Stage.VERIFYING)
        for added in change.added:
            if not await self.session.opens(added.keyslot, added.secret):
                raise ConsistencyError(f"cannot open the new keyslot {added.keyslot} with its own secret")
        committed = self._headers(base)
        if change.closing:
            await self.session.apply(change.closing)
        return self._result(base, committed)

    async def heal(self, snapshot: Snapshot) -> bytes:
        """Let libcryptsetup recover the losing copy; the header bytes afterwards.

        It leaves two valid copies with one sequence number alone, even if they differ; so if its first load has
        chosen the winner that we have chosen, and changed nothing, the loser is blanked and it is asked again.
        """
        self.fill(snapshot)
        await self._load_same(snapshot)
        healed = self._headers(snapshot)
        if healed == snapshot.pair.raw:
            size = snapshot.pair.hdr_size
            self.shadow.write(0 if snapshot.pair.loser is Which.PRIMARY else size, bytes(size))
            await self._load_same(snapshot)
            healed = self._headers(snapshot)
        return healed

    async def _load_same(self, snapshot: Snapshot) -> None:
        """libcryptsetup must read the header as we do; else we do not understand it, and leave it alone."""
        if await self.session.load() != snapshot.view.metadata.raw:
            if snapshot.pair.doubt:
                raise NeedsPerson(
                    f"cannot use the header: libcryptsetup accepts a copy that we refuse: {snapshot.pair.doubt}"
                )
            raise ConsistencyError("cannot use the header: libcryptsetup reads it otherwise")

    def _headers(self, snapshot: Snapshot) -> bytes:
        return self.shadow.read(0, len(snapshot.pair.raw))

    def _result(self, snapshot: Snapshot, committed: bytes) -> ShadowResult:
        headers = len(snapshot.pair.raw)
        data = {}
        for extent in self.shadow.data_extents():
            start = max(extent.offset, headers)
            if start < extent.end:
                data[Extent(start, extent.end - start)] = self.shadow.read(start, extent.end - start)
        return ShadowResult(snapshot.areas, committed, self._headers(snapshot), data)


@asynccontextmanager
async def workbench(host: Host, length: int, secrets: Mapping[str, SecretSource]) -> AsyncIterator[Workbench]:
    """A new one, for a header area of ``length`` bytes; leaving it kills the worker."""
    shadow = host.shadows.create(length)
    try:
        async with host.engine.session(shadow, secrets) as session:
            yield Workbench(shadow, session)
    finally:
        shadow.close()


async def unlock(session: EngineSession, change: Change, *, volume_key: bool) -> None:
    """Get the volume key; if keyslots go, by a credential that opens one of those that stay."""
    if volume_key and change.survivors is not None:
        raise InvalidRequest("cannot remove a keyslot by the volume key: show the passphrase of a keyslot that stays")
    if volume_key:
        return await session.take_volume_key()
    opened = await session.unlock()
    if change.survivors is None or opened in change.survivors:
        return None
    # The same passphrase may open a keyslot that stays, too.
    for keyslot in sorted(change.survivors):
        if await session.opens(keyslot, UNLOCK):
            return None
    if opened not in change.destroyed:
        wanted = " or ".join(map(str, sorted(change.survivors)))
        raise WrongCredential(f"cannot use this credential: it opens keyslot {opened}, not {wanted}")
    raise LastKeyslot(f"cannot remove keyslot {opened}: the credential opens no other one; use one that stays")
