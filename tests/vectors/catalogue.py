# SPDX-License-Identifier: GPL-2.0-or-later
"""Odd and malformed headers, one vector for each way of being wrong.

A vector is a function that alters the head of a healthy volume, with what must come of it: ``primary`` or
``secondary`` for the copy in force, or an error and a part of its message.  ``cryptsetup luksDump`` is asked about
each as well (``test_vectors.py``).  ``stricter`` gives the reason where it accepts what we refuse; where nothing is
said both must accept, and take the same copy, or both must refuse.
"""

import copy as copying
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from luksrotd.luks2 import layout
from luksrotd.luks2.layout import Which
from tests.support import forge
from tests.support.forge import BOTH, Json

PRIMARY, SECONDARY = [Which.PRIMARY], [Which.SECONDARY]
DEVICE_SIZE = 20 * 1024 * 1024
KIB = 1024


@dataclass(frozen=True)
class Image:
    """A device of ``size`` bytes that starts with ``head`` and goes on with zeros."""

    head: bytes
    size: int = DEVICE_SIZE

    def read(self, offset: int, length: int) -> bytes:
        return self.head[offset : offset + length].ljust(length, b"\0")


@dataclass(frozen=True)
class Vector:
    name: str
    build: Callable[[bytes], Image]
    expect: str
    stricter: str


VECTORS: list[Vector] = []


def vector(expect: str, *, stricter: str = "") -> Callable[[Any], Any]:
    def register(function):
        def build(head: bytes) -> Image:
            made = function(head)
            return made if isinstance(made, Image) else Image(made)

        VECTORS.append(Vector(function.__name__, build, expect, stricter))
        return function

    return register


def json_vector(
    name: str, expect: str, edit: forge.Edit, *, stricter: str = "", which: list[Which] | tuple[Which, ...] = BOTH
) -> None:
    """A vector that differs in the JSON of (by default) both copies."""
    VECTORS.append(Vector(name, lambda head: Image(forge.edited(head, edit, which)), expect, stricter))


def put(path: str, value: object) -> forge.Edit:
    """An edit that sets the member at a path such as ``keyslots/0/area/offset``."""
    *parents, last = path.split("/")

    def edit(raw: Json) -> None:
        for parent in parents:
            raw = raw[parent]
        raw[last] = copying.deepcopy(value)

    return edit


def drop(path: str) -> forge.Edit:
    """An edit that removes the member at a path."""
    *parents, last = path.split("/")

    def edit(raw: Json) -> None:
        for parent in parents:
            raw = raw[parent]
        del raw[last]

    return edit


def both(*edits: forge.Edit) -> forge.Edit:
    def edit(raw: Json) -> None:
        for each in edits:
            each(raw)

    return edit


# ---- healthy ----------------------------------------------------------------------------------------------------


@vector("primary")
def healthy(head):
    return head


@vector("primary")
def unknown_members_everywhere(head):
    def edit(raw):
        for holder in (raw, raw["config"], raw["keyslots"]["0"], raw["segments"]["0"], raw["digests"]["0"]):
            holder["x-unknown"] = {"nested": [1, None, True, "é", 1.5]}
        raw["tokens"]["0"] = {"type": "x-unknown", "keyslots": [], "more": 1}

    return forge.edited(head, edit)


@vector("primary")
def pretty_printed(head):
    return forge.with_text(head, json.dumps(forge.json_of(head), indent=2).encode())


@vector("primary")
def newline_behind_the_object(head):
    return forge.with_text(head, forge.text_of(head) + b"\n")


def resized(head: bytes, size: int) -> bytes:
    """The same volume with copies of ``size`` bytes and room for four keyslots."""

    def edit(raw: Json) -> None:
        raw["config"]["json_size"] = str(size - layout.BINARY_SIZE)
        raw["config"]["keyslots_size"] = str(KIB * KIB)
        raw["keyslots"]["0"]["area"]["offset"] = str(2 * size)
        raw["segments"]["0"]["offset"] = str(2 * size + KIB * KIB)

    raw = forge.json_of(head)
    edit(raw)
    old = forge.hdr_size_of(head)
    image = head[:old].ljust(size, b"\0") + head[old : 2 * old].ljust(size, b"\0")
    image = forge.put(image, 8, size.to_bytes(8, "big"))
    image = forge.with_fields(image, PRIMARY, hdr_size=size)
    image = forge.with_fields(image, SECONDARY, hdr_size=size, hdr_offset=size)
    return forge.with_json(image, raw)


for kib in (32, 64, 128, 256, 512, 1024, 2048, 4096):
    VECTORS.append(
        Vector(f"header_of_{kib}_kib", lambda head, kib=kib: Image(resized(head, kib * KIB)), "primary", stricter="")
    )


@vector("primary")
def label_that_is_not_utf8(head):
    return forge.with_fields(head, label=b"\xff" * 48)


CHECKSUMS = (
    "sha1",
    "sha224",
    "sha384",
    "sha512",
    "sha3-224",
    "sha3-256",
    "sha3-384",
    "sha3-512",
    "blake2b-512",
    "blake2s-256",
)

for algorithm in CHECKSUMS:
    VECTORS.append(
        Vector(
            f"checksum_{algorithm}",
            lambda head, algorithm=algorithm: Image(forge.with_fields(head, csum_alg=algorithm.encode())),
            "primary",
            stricter="",
        )
    )


# ---- which copy -------------------------------------------------------------------------------------------------


@vector("primary")
def primary_is_newer(head):
    return forge.newer(head, PRIMARY)


@vector("secondary")
def secondary_is_newer(head):
    return forge.newer(head, SECONDARY)


@vector("secondary")
def secondary_is_newer_by_the_highest_number(head):
    return forge.with_fields(head, SECONDARY, seqid=2**64 - 1)


@vector("primary")
def equal_numbers_but_different_json(head):
    return forge.edited(head, put("tokens/0", {"type": "x", "keyslots": []}), SECONDARY)


@vector("secondary")
def primary_is_torn(head):
    return forge.torn(
        head, forge.newer(forge.edited(head, put("tokens/0", {"type": "x", "keyslots": []})), BOTH), *PRIMARY
    )


@vector("primary")
def secondary_is_torn(head):
    after = forge.newer(forge.edited(head, put("tokens/0", {"type": "x", "keyslots": []})), BOTH)
    return forge.torn(forge.put(head, 0, after[: 16 * KIB]), after, *SECONDARY)


@vector("secondary")
def primary_checksum_is_wrong(head):
    return forge.unsealed(head, *PRIMARY)


@vector("primary")
def secondary_checksum_is_wrong(head):
    return forge.unsealed(forge.newer(head, SECONDARY), *SECONDARY)


@vector("secondary")
def primary_is_destroyed(head):
    return forge.erased(head, *PRIMARY)


@vector("secondary")
def primary_of_4_mib_is_destroyed(head):
    return forge.put(resized(head, 4096 * KIB), 0, bytes(4096 * KIB))


@vector("primary")
def secondary_is_missing(head):
    return forge.erased(head, *SECONDARY)


@vector("secondary")
def primary_magic_is_wrong(head):
    return forge.with_fields(head, PRIMARY, magic=b"LUKS\0\0")


@vector("secondary")
def primary_version_is_0(head):
    return forge.with_fields(head, PRIMARY, version=0)


@vector("primary")
def secondary_version_is_3(head):
    return forge.with_fields(head, SECONDARY, version=3)


@vector("primary")
def secondary_claims_another_offset(head):
    return forge.with_fields(head, SECONDARY, hdr_offset=32 * KIB)


@vector("secondary")
def primary_claims_another_offset(head):
    return forge.with_fields(head, PRIMARY, hdr_offset=4096)


@vector("primary")
def secondary_claims_another_size(head):
    return forge.put(head, 16 * KIB + 8, (32 * KIB).to_bytes(8, "big"))


@vector("secondary")
def primary_size_is_too_small_to_be_read(head):
    return forge.put(head, 8, (8 * KIB).to_bytes(8, "big"))


@vector("secondary")
def primary_size_is_too_large_to_be_read(head):
    return forge.put(head, 8, (8 * KIB * KIB).to_bytes(8, "big"))


@vector("secondary")
def primary_size_is_beyond_the_device(head):
    return Image(forge.put(head, 8, (4096 * KIB).to_bytes(8, "big")), 32 * KIB + 16744448)


@vector("FormatError: hdr_size 20480")
def both_of_a_size_that_does_not_exist(head):
    return resized(head, 20 * KIB)


@vector("FormatError: cannot read LUKS2 metadata")
def primary_of_a_size_that_does_not_exist(head):
    # Its checksum is right, so libcryptsetup looks for the other copy behind it, and not at 16 KiB where it is.
    oversize = forge.put(head, 8, (20 * KIB).to_bytes(8, "big"))
    return forge.sealed(oversize, Which.PRIMARY)


@vector("FormatError: does not start with an object")
def first_secondary_in_the_scan_is_well_sealed_rubbish(head):
    # Its checksum is right, so libcryptsetup's scan ends there, before the good one.
    good = forge.put(resized(head, 32 * KIB), 0, bytes(32 * KIB))
    rubbish = forge.with_text(head, b"rubbish", SECONDARY)[16 * KIB : 32 * KIB]
    return forge.put(good, 16 * KIB, rubbish)


@vector("secondary")
def first_secondary_in_the_scan_has_a_wrong_checksum(head):
    good = forge.put(resized(head, 32 * KIB), 0, bytes(32 * KIB))
    return forge.put(good, 16 * KIB, forge.unsealed(head, *SECONDARY)[16 * KIB : 32 * KIB])


@vector("primary")
def secondary_json_is_invalid_and_older(head):
    return forge.edited(forge.newer(head, PRIMARY), drop("config"), SECONDARY)


@vector("secondary")
def primary_json_is_invalid_and_older(head):
    return forge.edited(forge.newer(head, SECONDARY), drop("config"), PRIMARY)


IN_DOUBT = "libcryptsetup accepts the JSON of the newer copy; whoever acts on the older one asks it first"


@vector("secondary, in doubt")
def primary_json_is_invalid_and_newer(head):
    return forge.edited(forge.newer(head, PRIMARY), drop("config"), PRIMARY)


@vector("secondary, in doubt")
def primary_json_is_invalid_and_equal(head):
    return forge.edited(head, drop("config"), PRIMARY)


@vector("primary, in doubt")
def secondary_json_is_invalid_and_newer(head):
    return forge.edited(forge.newer(head, SECONDARY), drop("config"), SECONDARY)


@vector("secondary, in doubt", stricter=IN_DOUBT)
def primary_is_newer_and_only_json_c_can_read_it(head):
    return forge.with_text(forge.newer(head, PRIMARY), forge.text_of(head).replace(b"{", b"{/* */", 1), PRIMARY)


# ---- nothing usable ---------------------------------------------------------------------------------------------


@vector("FormatError: checksum does not match")
def both_checksums_are_wrong(head):
    return forge.unsealed(forge.unsealed(head, Which.PRIMARY), Which.SECONDARY)


@vector("UnknownDevice: cannot find")
def both_copies_are_gone(head):
    return Image(b"")


@vector("FormatError: the magic is missing")
def primary_is_gone_and_secondary_is_bad(head):
    return forge.erased(forge.unsealed(head, *SECONDARY), *PRIMARY)


@vector("UnknownDevice: cannot find")
def empty_device(head):
    return Image(b"", 0)


@vector("UnknownDevice: cannot find")
def device_of_one_sector(head):
    return Image(b"", 512)


@vector("FormatError: 400 bytes of the binary header")
def device_that_ends_in_the_binary_header(head):
    return Image(head[:400], 400)


@vector("FormatError: of its 16384 bytes")
def device_that_ends_in_the_primary(head):
    return Image(head[:8192], 8192)


@vector("FormatError: it needs 16777216 bytes, the device has 16776704")
def device_that_ends_one_sector_early(head):
    return Image(head, 32 * KIB + 16744448 - 512)


@vector("primary")
def device_that_is_just_long_enough(head):
    return Image(head, 32 * KIB + 16744448)


@vector("FormatError: version 3 is not 2")
def both_of_version_3(head):
    return forge.with_fields(head, version=3)


@vector("FormatError: version 3 is not 2")
def primary_of_version_3_over_a_good_secondary(head):
    # A later format may have been put over LUKS2: its header must not be "healed".
    return forge.with_fields(head, PRIMARY, version=3)


@vector("FormatError: hdr_offset 512")
def both_at_another_offset(head):
    return forge.with_fields(head, hdr_offset=512)


@vector("FormatError: checksum algorithm 'md5'", stricter="no tool writes it, and it proves nothing")
def checksum_md5(head):
    for which in BOTH:
        head = forge.with_fields(head, [which], csum_alg=b"md5", csum=bytes(layout.CSUM_SIZE))
        start = forge.offset_of(head, which)
        csum = hashlib.md5(head[start : start + 16 * KIB]).digest()
        head = forge.put(head, start + layout.CSUM_OFFSET, csum)
    return head


@vector("FormatError: checksum algorithm 'SHA256'", stricter="no tool writes it so")
def checksum_in_capitals(head):
    return forge.with_fields(head, csum_alg=b"SHA256")


@vector("FormatError: checksum algorithm 'nonsense'")
def checksum_unknown(head):
    return forge.with_fields(head, csum_alg=b"nonsense")


@vector("FormatError: checksum algorithm ''")
def checksum_unnamed(head):
    return forge.with_fields(head, csum_alg=b"")


@vector(
    "FormatError: checksum algorithm 'sha257'", stricter="one that libcryptsetup knows and we do not could be in force"
)
def checksum_unknown_in_the_primary_only(head):
    return forge.with_fields(head, PRIMARY, csum_alg=b"sha257")


# ---- LUKS1 ------------------------------------------------------------------------------------------------------

LUKS1 = b"LUKS\xba\xbe\0\1" + b"aes".ljust(32, b"\0") + b"xts-plain64".ljust(32, b"\0")


@vector("NotLuks2: LUKS1")
def luks1(head):
    return Image(LUKS1)


@vector("NotLuks2: LUKS1")
def luks1_over_an_older_luks2(head):
    # The secondary of the LUKS2 volume that was there is still good: "healing" would destroy the LUKS1 header.
    return forge.put(head, 0, LUKS1.ljust(592, b"\0"))
