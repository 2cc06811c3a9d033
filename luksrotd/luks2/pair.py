# SPDX-License-Identifier: GPL-2.0-or-later
"""The two copies together: which is valid, which one libcryptsetup uses (LUKS2_disk_hdr_read).

The rule: both valid → the higher sequence number wins, the primary if they are equal; one valid → that one.  The
secondary is looked for behind the primary, or, only if the primary's binary header or checksum is bad, at every
offset that the format allows, up to the first with a right checksum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from luksrotd.errors import DeviceError, FormatError, NotLuks2, UnknownDevice
from luksrotd.luks2 import header as binary_header
from luksrotd.luks2 import layout, metadata
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.header import BinaryHeader
from luksrotd.luks2.layout import Which
from luksrotd.luks2.metadata import Metadata

Read = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class HeaderCopy:
    """A valid copy; ``raw`` are its ``hdr_size`` bytes."""

    header: BinaryHeader
    metadata: Metadata
    raw: bytes

    def same_content(self, other: "HeaderCopy") -> bool:
        """Whether both say the same: everything but salt, checksum and the spelling of the JSON."""
        return self._content() == other._content() and self.metadata.raw == other.metadata.raw

    def _content(self) -> tuple[object, ...]:
        head = self.header
        return (head.seqid, head.hdr_size, head.label, head.csum_alg, head.uuid, head.subsystem)


@dataclass(frozen=True, slots=True)
class BadCopy:
    """A copy that is not valid, and why; ``present`` tells whether at least its magic is there.

    ``seqid``: its sequence number, if its checksum is right.  We refuse some JSON that libcryptsetup accepts, so to
    libcryptsetup such a copy may be valid.
    """

    which: Which
    reason: str
    present: bool
    seqid: int | None = None

    def may_outrank(self, winner: HeaderCopy) -> bool:
        """Whether libcryptsetup could prefer this copy to ``winner``."""
        if self.seqid is None or self.seqid == winner.header.seqid:
            return self.seqid is not None and self.which is Which.PRIMARY
        return self.seqid > winner.header.seqid


@dataclass(frozen=True)
class Pair:
    """Both copies of one volume, at least one of them valid; ``raw`` are the ``2 * hdr_size`` bytes that hold them."""

    primary: HeaderCopy | BadCopy
    secondary: HeaderCopy | BadCopy
    raw: bytes

    @property
    def hdr_size(self) -> int:
        """Bytes of one copy."""
        return self.winner.header.hdr_size

    @cached_property
    def winner(self) -> HeaderCopy:
        """The copy that libcryptsetup uses."""
        first, second = self.valid[0], self.valid[-1]
        return second if second.header.seqid > first.header.seqid else first

    @cached_property
    def valid(self) -> tuple[HeaderCopy, ...]:
        """The valid copies, primary first; never empty."""
        return tuple(copy for copy in (self.primary, self.secondary) if isinstance(copy, HeaderCopy))

    @property
    def agree(self) -> bool:
        """Whether both copies are valid and say the same."""
        copies = self.valid
        return len(copies) == len(Which) and copies[0].same_content(copies[1])

    @property
    def loser(self) -> Which | None:
        """The copy that has to be rewritten from the winner; ``None`` if they agree."""
        return None if self.agree else self.winner.header.which.other

    @property
    def doubt(self) -> str:
        """Why libcryptsetup could use another copy than ``winner``; '' if it cannot.

        There is a copy with a right checksum, that would win, and whose JSON we refuse.  Nearly always libcryptsetup
        refuses it too; whoever wants to act on ``winner`` asks it first.
        """
        bad = (copy for copy in (self.primary, self.secondary) if isinstance(copy, BadCopy))
        return next((copy.reason for copy in bad if copy.may_outrank(self.winner)), "")

    @property
    def referenced(self) -> tuple[Extent, ...]:
        """Every keyslot area that a valid copy references (invariant I4 counts both)."""
        return tuple(sorted({area for copy in self.valid for area in copy.metadata.areas}))

    @property
    def length(self) -> int:
        """Bytes from the start of the device to the end of the keyslots area: what a shadow must have."""
        return self.winner.metadata.keyslots_area.end


def read_pair(read: Read, device_size: int) -> Pair:
    """Read both copies with ``read(offset, length)`` from a device of ``device_size`` bytes.

    Two copies of the usual size are read by one call; of larger ones what lies behind that comes by further calls, at
    most some 20 MiB.  Raises ``FormatError`` if neither copy is valid, ``NotLuks2`` for LUKS1, ``UnknownDevice`` if
    there is no trace of LUKS, and what ``read`` raises for blocks that lie on the device.
    """
    read = _ahead(read, device_size)
    primary, secondary, hdr_size = _read_copies(read, device_size)
    if isinstance(primary, BadCopy) and isinstance(secondary, BadCopy):
        raise _neither(primary, secondary)
    assert hdr_size is not None  # noqa: S101 - a valid copy has one
    if isinstance(primary, HeaderCopy) and isinstance(secondary, HeaderCopy):
        raw = primary.raw + secondary.raw
    else:
        raw = _read(read, 0, 2 * hdr_size, device_size)
    pair = Pair(primary, secondary, raw)
    if pair.length > device_size:
        raise FormatError(f"cannot use the LUKS2 header: it needs {pair.length} bytes, the device has {device_size}")
    return pair


def parse_pair(image: bytes, size: int | None = None) -> Pair:
    """``read_pair`` on an image in memory that is at least as long as the header area.

    With ``size``: of a device of so many bytes that begins with ``image``, and is all zeros behind it.
    """
    # Not padded as a whole: a header area has 16 MiB, which take longer to copy than a commit.
    return read_pair(
        lambda offset, length: image[offset : offset + length].ljust(length, b"\0"),
        len(image) if size is None else size,
    )


def is_lost(read: Read, device_size: int) -> bool:
    """Whether the device has no header copy, nor one with a right checksum that libcryptsetup might accept.

    Raises as ``read_pair`` for another version than LUKS2.
    """
    primary, secondary, _ = _read_copies(read, device_size)
    return all(isinstance(copy, BadCopy) and copy.seqid is None for copy in (primary, secondary))


def _read_copies(read: Read, device_size: int) -> tuple[HeaderCopy | BadCopy, HeaderCopy | BadCopy, int | None]:
    """Both copies, and the hdr_size if one tells it."""
    _check_version(_read(read, 0, layout.BINARY_SIZE, device_size))
    primary, hdr_size = _read_copy(read, Which.PRIMARY, 0, device_size)
    if hdr_size is not None:
        secondary, _ = _read_copy(read, Which.SECONDARY, hdr_size, device_size, like=primary)
    else:
        secondary, hdr_size = _scan_secondary(read, device_size)
    return primary, secondary, hdr_size


def _check_version(start: bytes) -> None:
    """Refuse other versions as crypt_load(3) does, before it looks at the secondary; 0 passes for a damaged primary.

    The secondary of an older LUKS2 volume may well have survived below another header.
    """
    version = int.from_bytes(start[6:8], "big") if binary_header.has_magic(start, Which.PRIMARY) else 0
    if version == 1:
        raise NotLuks2("cannot use this volume: it is LUKS1; see cryptsetup-convert(8)")
    if version > layout.VERSION:
        raise binary_header.bad(Which.PRIMARY, f"version {version} is not {layout.VERSION}")


def _read_copy(
    read: Read, which: Which, offset: int, device_size: int, *, like: HeaderCopy | BadCopy | None = None
) -> tuple[HeaderCopy | BadCopy, int | None]:
    """A copy, and its hdr_size if its binary header and checksum are good (even if its JSON is not).

    ``like``: the other copy, whose JSON is mostly the same to the byte.
    """
    start = _read(read, offset, layout.BINARY_SIZE, device_size)
    try:
        head = binary_header.decode(start, which, offset)
    except FormatError as error:
        return BadCopy(which, error.message, binary_header.has_magic(start, which)), None
    return _read_body(read, head, device_size, like)


def _read_body(
    read: Read, head: BinaryHeader, device_size: int, like: HeaderCopy | BadCopy | None
) -> tuple[HeaderCopy | BadCopy, int | None]:
    if head.csum_alg not in binary_header.CHECKSUMS:
        # libcryptsetup may know it: then this copy could be the one in force, and we could not tell.
        raise binary_header.bad(head.which, f"checksum algorithm {head.csum_alg!r} is unknown")
    raw = _read(read, head.hdr_offset, head.hdr_size, device_size)
    try:
        if len(raw) < head.hdr_size:
            raise binary_header.bad(head.which, f"only {len(raw)} of its {head.hdr_size} bytes are there")
        binary_header.verify_checksum(head, raw)
    except FormatError as error:
        return BadCopy(head.which, error.message, present=True), None
    try:
        return HeaderCopy(head, _metadata(raw, head, like), raw), head.hdr_size
    except FormatError as error:
        return BadCopy(head.which, error.message, present=True, seqid=head.seqid), head.hdr_size


def _metadata(raw: bytes, head: BinaryHeader, like: HeaderCopy | BadCopy | None) -> Metadata:
    """What the JSON of a copy says; the same bytes in a copy of the same size say the same."""
    area = raw[layout.BINARY_SIZE :]
    if isinstance(like, HeaderCopy) and like.raw[layout.BINARY_SIZE :] == area:
        return like.metadata
    return metadata.parse(area, head.hdr_size)


def _scan_secondary(read: Read, device_size: int) -> tuple[HeaderCopy | BadCopy, int | None]:
    found = BadCopy(Which.SECONDARY, "cannot read the secondary LUKS2 header: it is nowhere", present=False)
    for offset in layout.HEADER_SIZES:
        copy, hdr_size = _read_copy(read, Which.SECONDARY, offset, device_size)
        if isinstance(copy, HeaderCopy) or hdr_size is not None:
            return copy, hdr_size
        if copy.present and not found.present:
            found = copy
    return found, None


def _ahead(read: Read, device_size: int) -> Read:
    """``read``, but of the place of two copies of the usual size by one call, for each costs a turn of the disk."""
    try:
        start = _read(read, 0, 2 * layout.HEADER_SIZE_MIN, device_size)
    except DeviceError:
        return read  # what is needed of it may be legible all the same

    def ahead(offset: int, length: int) -> bytes:
        end = offset + length
        return start[offset:end] if end <= len(start) else read(offset, length)

    return ahead


def _read(read: Read, offset: int, length: int, device_size: int) -> bytes:
    """As much of the range as lies on the device."""
    length = min(length, device_size - offset)
    if length <= 0:
        return b""
    block = read(offset, length)
    if len(block) != length:
        raise DeviceError(f"cannot read {length} bytes at {offset}: only {len(block)} came")
    return block


def _neither(primary: BadCopy, secondary: BadCopy) -> FormatError | UnknownDevice:
    if not (primary.present or secondary.present):
        return UnknownDevice("cannot find a LUKS2 header")
    return FormatError(f"{primary.reason}; {secondary.reason}")
