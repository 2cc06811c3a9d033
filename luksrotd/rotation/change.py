# SPDX-License-Identifier: GPL-2.0-or-later
"""A change: the edits of one transaction, in the two stages in which they reach the device."""

from collections.abc import Iterator, Mapping

from luksrotd.luks2.areas import Extent
from luksrotd.luks2.metadata import Metadata
from luksrotd.luks2.pair import Pair
from luksrotd.records import dataclass
from luksrotd.rotation.edits import AddKeyslot, DestroyKeyslot, Edit, RemoveToken, SetToken


@dataclass(frozen=True, slots=True)
class Start:
    """Another header to start from than the device's: two copies that agree, and the bytes of every area they name.

    Its areas lie where the device's header has the same area, or none: so they can be written before it is.
    """

    pair: Pair
    areas: Mapping[Extent, bytes]

    @property
    def metadata(self) -> Metadata:
        """What both copies say."""
        return self.pair.winner.metadata


@dataclass(frozen=True, slots=True)
class Change:
    """``edits`` are committed first, then ``wipe`` is overwritten, then ``closing`` is committed.

    ``wipe`` are ranges that no copy references once ``edits`` are committed; those that ``edits`` retire are added by
    ``retired``.  Secrets are named as in ``rotation.edits``; an added keyslot needs the volume key, so ``unlock``.
    ``survivors``: if given, the credential must open one of these keyslots: nobody removes a way in who has not shown
    another one.  ``start``: if given, the edits are made on that header in place of the device's.
    """

    edits: tuple[Edit, ...] = ()
    closing: tuple[Edit, ...] = ()
    wipe: tuple[Extent, ...] = ()
    survivors: frozenset[int] | None = None
    start: Start | None = None

    @property
    def added(self) -> tuple[AddKeyslot, ...]:
        """The keyslots that are added."""
        return tuple(edit for edit in self.edits if isinstance(edit, AddKeyslot))

    @property
    def destroyed(self) -> tuple[int, ...]:
        """The keyslots that are removed."""
        return tuple(edit.keyslot for edit in self.edits if isinstance(edit, DestroyKeyslot))

    @property
    def needs_unlock(self) -> bool:
        """Whether a credential is needed."""
        return bool(self.added) or self.survivors is not None

    def retired(self, before: Metadata) -> tuple[Extent, ...]:
        """The areas that ``before``, the device's header, names, or the start, and the changed header does not."""
        base = before if self.start is None else self.start.metadata
        dropped = sorted(set(before.areas) - set(base.areas))
        return (*dropped, *(base.keyslots[keyslot].area for keyslot in self.destroyed))


def written_tokens(edits: tuple[Edit, ...]) -> dict[int, SetToken | None]:
    """What the token edits leave, by token number; ``None`` for a removed token."""
    return dict(_token_edits(edits))


def _token_edits(edits: tuple[Edit, ...]) -> Iterator[tuple[int, SetToken | None]]:
    for edit in edits:
        if isinstance(edit, SetToken):
            yield edit.token, edit
        elif isinstance(edit, RemoveToken):
            yield edit.token, None
