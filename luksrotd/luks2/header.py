# SPDX-License-Identifier: GPL-2.0-or-later
"""The binary header of one copy, and its checksum (LUKS2 specification, section 2.1)."""

import hashlib
from dataclasses import replace
from typing import Final

from luksrotd.errors import FormatError
from luksrotd.luks2 import layout
from luksrotd.luks2.layout import Which
from luksrotd.records import dataclass

#: Checksum algorithms that we can recompute; libcryptsetup's spelling → hashlib's.  luksFormat writes sha256.
CHECKSUMS: Final = {
    "sha1": "sha1",
    "sha224": "sha224",
    "sha256": "sha256",
    "sha384": "sha384",
    "sha512": "sha512",
    "sha3-224": "sha3_224",
    "sha3-256": "sha3_256",
    "sha3-384": "sha3_384",
    "sha3-512": "sha3_512",
    "blake2b-512": "blake2b",
    "blake2s-256": "blake2s",
}

_SEQID_END: Final = 2**64


@dataclass(frozen=True, slots=True)
class BinaryHeader:
    """The fields of a binary header; ``hdr_size`` and ``hdr_offset`` in bytes, ``seqid`` the sequence number.

    ``label``, ``uuid`` and ``subsystem`` are text for display; bytes that are not UTF-8 are replaced in them.
    """

    which: Which
    hdr_size: int
    seqid: int
    label: str
    csum_alg: str
    salt: bytes
    uuid: str
    subsystem: str
    csum: bytes

    @property
    def hdr_offset(self) -> int:
        """Where this copy lies."""
        return 0 if self.which is Which.PRIMARY else self.hdr_size

    @property
    def json_size(self) -> int:
        """Bytes of the JSON area."""
        return self.hdr_size - layout.BINARY_SIZE


def has_magic(block: bytes, which: Which) -> bool:
    """Whether ``block`` starts with the magic of that copy."""
    return block.startswith(layout.MAGIC[which])


def decode(block: bytes, which: Which, offset: int) -> BinaryHeader:
    """The binary header in ``block`` (at least 512 bytes), read from byte ``offset`` of the device.

    Makes the checks that libcryptsetup makes before the checksum (hdr_disk_sanity_check_pre), and no others: what has
    a right checksum is where libcryptsetup stops looking.  Raises ``FormatError``.
    """
    if len(block) < layout.FIELDS_SIZE:
        raise bad(which, f"only {len(block)} bytes of the binary header are there")
    fields = layout.BINARY.unpack_from(block)
    magic, version, hdr_size, seqid, label, csum_alg, salt, uuid, subsystem, hdr_offset, _, csum = fields
    if magic != layout.MAGIC[which]:
        raise bad(which, "the magic is missing")
    if version != layout.VERSION:
        raise bad(which, f"version {version} is not 2")
    if not layout.HEADER_SIZE_MIN <= hdr_size <= layout.HEADER_SIZE_MAX:
        raise bad(which, f"hdr_size {hdr_size} is out of range")
    if hdr_offset != offset or (which is Which.SECONDARY and offset != hdr_size):
        raise bad(which, f"hdr_offset {hdr_offset} does not fit a copy of {hdr_size} bytes at offset {offset}")
    return BinaryHeader(
        which, hdr_size, seqid, _text(label), _text(csum_alg), salt, _text(uuid), _text(subsystem), csum
    )


def verify_checksum(header: BinaryHeader, copy: bytes) -> None:
    """Check the checksum over the whole ``copy`` (``hdr_size`` bytes); raises ``FormatError``."""
    expected = checksum(header.csum_alg, copy, header.which)
    if header.csum[: len(expected)] != expected:
        raise bad(header.which, "the checksum does not match")


def checksum(algorithm: str, copy: bytes, which: Which) -> bytes:
    """The checksum of ``copy`` with its checksum field taken as zero; ``FormatError`` for an unknown algorithm."""
    name = CHECKSUMS.get(algorithm)
    if name is None:
        raise bad(which, f"checksum algorithm {algorithm!r} is unknown")
    digest = hashlib.new(name, usedforsecurity=False)
    digest.update(copy[: layout.CSUM_OFFSET])
    digest.update(bytes(layout.CSUM_SIZE))
    digest.update(memoryview(copy)[layout.FIELDS_SIZE :])
    return digest.digest()


def encode(header: BinaryHeader, json: bytes) -> bytes:
    """A whole copy: binary header, JSON, zero padding, with the checksum recomputed (``header.csum`` is not used).

    Raises ``FormatError`` if the JSON does not leave room for the terminating zero.
    """
    fields = layout.BINARY.pack(
        layout.MAGIC[header.which],
        layout.VERSION,
        header.hdr_size,
        header.seqid,
        header.label.encode(),
        header.csum_alg.encode(),
        header.salt,
        header.uuid.encode(),
        header.subsystem.encode(),
        header.hdr_offset,
        b"",
        b"",
    )
    return _sealed(fields, json, header)


def derive(like: BinaryHeader, raw: bytes, which: Which, salt: bytes, seqid: int, json: bytes) -> bytes:
    """A whole copy ``which`` like the copy ``raw``, whose fields are ``like``, but for what is given.

    The other fields stay as they are byte for byte, even where they are no text.  Raises ``FormatError`` where a
    number or the JSON does not fit.
    """
    if not 0 <= seqid < _SEQID_END:
        raise bad(which, f"sequence number {seqid} is out of range")
    _, version, hdr_size, _, label, csum_alg, _, uuid, subsystem, *_ = layout.BINARY.unpack_from(raw)
    head = replace(like, which=which)
    fields = layout.BINARY.pack(
        layout.MAGIC[which],
        version,
        hdr_size,
        seqid,
        label,
        csum_alg,
        salt,
        uuid,
        subsystem,
        head.hdr_offset,
        b"",
        b"",
    )
    return _sealed(fields, json, head)


def _sealed(fields: bytes, json: bytes, header: BinaryHeader) -> bytes:
    """Fields and JSON, padded, with their checksum."""
    if len(json) >= header.json_size:
        raise bad(header.which, f"{len(json)} bytes of JSON do not fit into {header.json_size}")
    copy = fields.ljust(layout.BINARY_SIZE, b"\0") + json.ljust(header.json_size, b"\0")
    csum = checksum(header.csum_alg, copy, header.which).ljust(layout.CSUM_SIZE, b"\0")
    return copy[: layout.CSUM_OFFSET] + csum + copy[layout.FIELDS_SIZE :]


def bad(which: Which, what: str) -> FormatError:
    """The one form of "this copy is not good"."""
    return FormatError(f"cannot read the {which} LUKS2 header: {what}")


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")
