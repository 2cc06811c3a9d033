# SPDX-License-Identifier: GPL-2.0-or-later
"""The LUKS2 on-disk constants (LUKS2 On-Disk Format Specification 1.1, sections 2 and 3).  Units: bytes."""

import struct
from enum import StrEnum
from typing import Final


class Which(StrEnum):
    """The two copies of the header."""

    PRIMARY = "primary"
    SECONDARY = "secondary"

    @property
    def other(self) -> "Which":
        """The other copy."""
        return Which.SECONDARY if self is Which.PRIMARY else Which.PRIMARY


MAGIC: Final = {Which.PRIMARY: b"LUKS\xba\xbe", Which.SECONDARY: b"SKUL\xba\xbe"}
VERSION: Final = 2

#: Bytes of a binary header; the JSON area follows.
BINARY_SIZE: Final = 4096
#: Part of the binary header that carries fields; the rest is zero.
FIELDS_SIZE: Final = 512
#: Allowed sizes of one copy (binary header and JSON area); the secondary copy lies at that offset.
HEADER_SIZES: Final = tuple(kib * 1024 for kib in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096))
#: Bounds that libcryptsetup checks before it has seen the JSON (lib/luks2/luks2_disk_metadata.c).
HEADER_SIZE_MIN: Final = HEADER_SIZES[0]
HEADER_SIZE_MAX: Final = HEADER_SIZES[-1]

#: magic, version, hdr_size, seqid, label, csum_alg, salt, uuid, subsystem, hdr_offset, padding, csum (big-endian).
BINARY: Final = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
CSUM_OFFSET: Final = 448
CSUM_SIZE: Final = 64

#: Keyslot areas are placed at multiples of this (not enforced by the format, assumed by libcryptsetup's allocator).
AREA_ALIGNMENT: Final = 4096
#: Upper bound of the keyslots area (LUKS2_MAX_KEYSLOTS_SIZE).
KEYSLOTS_SIZE_MAX: Final = 128 * 1024 * 1024
#: Numbers that libcryptsetup hands out: 0 … 31 (LUKS2_KEYSLOTS_MAX, LUKS2_TOKENS_MAX).
KEYSLOTS_MAX: Final = 32
TOKENS_MAX: Final = 32
#: More objects of a kind, or references in an array, than any tool makes: bounds what a hostile header can cost.
OBJECTS_MAX: Final = 128
#: Anti-forensic stripes of a keyslot area (section 3.2).
STRIPES: Final = 4000
SECTOR: Final = 512
#: Segment size that means "to the end of the device".
DYNAMIC: Final = "dynamic"
#: Priority of a keyslot that is only used when it is named.
PRIORITY_IGNORE: Final = 0

assert BINARY.size == FIELDS_SIZE  # noqa: S101 - the layout is checked against itself when it is imported
assert CSUM_OFFSET + CSUM_SIZE == FIELDS_SIZE  # noqa: S101 - as above


def keyslot_area_size(volume_key_size: int) -> int:
    """Bytes that libcryptsetup allots to the area of a keyslot (LUKS2_keyslot_area and _find_area_gap)."""
    return -(-volume_key_size * STRIPES // AREA_ALIGNMENT) * AREA_ALIGNMENT
