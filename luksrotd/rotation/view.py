# SPDX-License-Identifier: GPL-2.0-or-later
"""What a header means to us: which keyslots are ours, which are somebody's, what is odd."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from luksrotd.errors import FormatError
from luksrotd.luks2 import layout
from luksrotd.luks2.areas import Extent, subtract
from luksrotd.luks2.metadata import Keyslot, Metadata
from luksrotd.luks2.pair import Pair
from luksrotd.names import TOKEN_TYPE, WIPE_TOKEN_TYPE
from luksrotd.rotation import token as tokens
from luksrotd.rotation.fingerprint import fingerprint
from luksrotd.rotation.token import BackupToken, WipeRecord


@dataclass(frozen=True, slots=True)
class ManagedKey:
    """A token of ours with the keyslot that it names; ``keyslot`` is ``None`` unless it names exactly one.

    ``stale``: another tool has changed the keyslot since we wrote the token, or it is none that we could have made.
    ``shared``: other tokens name it too.
    """

    token: BackupToken
    keyslot: Keyslot | None
    stale: bool
    shared: bool

    @property
    def complete(self) -> bool:
        """Whether it is what we wrote: one keyslot, its own, unchanged."""
        return self.keyslot is not None and not self.stale and not self.shared

    @property
    def oddity(self) -> str:
        """Why it is not complete."""
        if self.keyslot is None:
            return f"its token names {len(self.token.keyslots)} keyslots, not one"
        return "another tool has changed its keyslot" if self.stale else "another token names its keyslot too"


@dataclass(frozen=True, slots=True)
class Summary:
    """What is kept of the view of a volume that is only shown: no bytes, which can be megabytes, and one copy."""

    label: str
    seqid: int
    digest: str
    metadata: Metadata
    keys: tuple[ManagedKey, ...]
    ordinary: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DeviceView:
    """The volume as luksrotd sees it; everything is taken from the winning copy, ``pair`` has both.

    ``unreadable``: why our own tokens of these numbers cannot be read.  ``digest``: SHA-256 of both copies as they lie
    on the device, in hexadecimal.
    """

    pair: Pair
    keys: tuple[ManagedKey, ...]
    records: tuple[WipeRecord, ...]
    unreadable: Mapping[int, str]
    ordinary: tuple[int, ...]
    digest: str

    @property
    def metadata(self) -> Metadata:
        """The metadata of the winning copy."""
        return self.pair.winner.metadata

    @property
    def uuid(self) -> str:
        """The LUKS UUID."""
        return self.pair.winner.header.uuid

    @property
    def label(self) -> str:
        """The label of the volume."""
        return self.pair.winner.header.label

    @property
    def seqid(self) -> int:
        """The sequence number."""
        return self.pair.winner.header.seqid

    @property
    def summary(self) -> Summary:
        """What may be kept of it for long."""
        return Summary(self.label, self.seqid, self.digest, self.metadata, self.keys, self.ordinary)

    @property
    def pending(self) -> tuple[Extent, ...]:
        """Ranges that wipe intents name."""
        intents = [key.token.wipe for key in self.keys] + [record.wipe for record in self.records]
        return tuple(extent for intent in intents for extent in intent)

    @property
    def free(self) -> tuple[Extent, ...]:
        """Space for new areas that neither copy references, ascending."""
        return subtract(self.metadata.keyslots_area, self.pair.referenced)

    def named(self, name: str) -> tuple[ManagedKey, ...]:
        """The keys of that name; which of them is which, ``rotation.lineage`` says."""
        return tuple(key for key in self.keys if key.token.name == name)

    def free_keyslot(self) -> int | None:
        """The lowest free keyslot number."""
        return _lowest_free(self.metadata.keyslots, layout.KEYSLOTS_MAX)

    def free_token(self) -> int | None:
        """The lowest free token number."""
        return _lowest_free(self.metadata.tokens, layout.TOKENS_MAX)


def view(pair: Pair) -> DeviceView:
    """The meaning of ``pair``; never raises, what is odd is in the view."""
    metadata = pair.winner.metadata
    keys: list[ManagedKey] = []
    records: list[WipeRecord] = []
    unreadable: dict[int, str] = {}
    for token in metadata.tokens.values():
        try:
            if token.type == TOKEN_TYPE:
                keys.append(_managed(tokens.parse(token), metadata))
            elif token.type == WIPE_TOKEN_TYPE:
                records.append(tokens.parse_record(token))
        except FormatError as error:
            unreadable[token.id] = error.message
    claimed = {keyslot for token in metadata.tokens.values() for keyslot in token.keyslots}
    ordinary = tuple(sorted(metadata.keyslots.keys() - claimed))
    return DeviceView(pair, tuple(keys), tuple(records), unreadable, ordinary, digest(pair.raw))


def digest(headers: bytes) -> str:
    """Of the bytes of both header copies."""
    return hashlib.sha256(headers).hexdigest()


def _managed(token: BackupToken, metadata: Metadata) -> ManagedKey:
    if len(token.keyslots) != 1:
        return ManagedKey(token, None, stale=False, shared=False)
    keyslot = metadata.keyslots[token.keyslots[0]]
    claims = sum(keyslot.id in other.keyslots for other in metadata.tokens.values())
    ours = keyslot.kdf_salt is not None and metadata.opens_volume(keyslot.id)
    stale = not ours or token.fingerprint not in (None, fingerprint(keyslot.raw))
    return ManagedKey(token, keyslot, stale, shared=claims > 1)


def _lowest_free(taken: Mapping[int, object], limit: int) -> int | None:
    return next((number for number in range(limit) if number not in taken), None)
