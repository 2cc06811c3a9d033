# SPDX-License-Identifier: GPL-2.0-or-later
"""Alters LUKS2 images in memory: other JSON, other fields, torn or missing copies.

Nothing is validated, that is the point; checksums are made right again unless a function breaks them on purpose.
An image is what ``simengine.make_volume`` or ``cryptsetup luksFormat`` has made; all functions return a new one.
"""

import copy as copying
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from luksrotd.luks2 import layout
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.header import CHECKSUMS
from luksrotd.luks2.layout import Which
from luksrotd.luks2.pair import Pair, parse_pair
from luksrotd.names import TOKEN_TYPE
from luksrotd.rotation.fingerprint import fingerprint
from luksrotd.rotation.view import DeviceView, view

Json = dict[str, Any]
Edit = Callable[[Json], object]

BOTH = tuple(Which)
FIELDS = (
    "magic", "version", "hdr_size", "seqid", "label", "csum_alg", "salt", "uuid", "subsystem", "hdr_offset", "padding",
    "csum",
)  # fmt: skip


def offset_of(image: bytes, which: Which) -> int:
    """Where a copy lies; the primary's ``hdr_size`` is believed."""
    return 0 if which is Which.PRIMARY else hdr_size_of(image)


def hdr_size_of(image: bytes) -> int:
    """What the primary says of its size."""
    return int.from_bytes(image[8:16], "big")


def fields_of(image: bytes, which: Which) -> Json:
    """The fields of a binary header by their names, as they are on disk."""
    return dict(zip(FIELDS, layout.BINARY.unpack_from(image, offset_of(image, which)), strict=True))


def text_of(image: bytes, which: Which = Which.PRIMARY) -> bytes:
    """The JSON text of a copy."""
    start = offset_of(image, which)
    return image[start + layout.BINARY_SIZE : start + hdr_size_of(image)].rstrip(b"\0")


def json_of(image: bytes, which: Which = Which.PRIMARY) -> Json:
    """The JSON object of a copy."""
    loaded: Json = json.loads(text_of(image, which))
    return loaded


def put(image: bytes, offset: int, data: bytes) -> bytes:
    """Other bytes at ``offset``; no checksum is touched."""
    return image[:offset] + data + image[offset + len(data) :]


def flip(image: bytes, bit: int) -> bytes:
    """One bit turned over."""
    return put(image, bit // 8, bytes([image[bit // 8] ^ 1 << bit % 8]))


def with_text(image: bytes, text: bytes, which: Iterable[Which] = BOTH) -> bytes:
    """Other bytes in the JSON area, padded with zeros or cut to its size."""
    size = hdr_size_of(image) - layout.BINARY_SIZE
    for each in which:
        start = offset_of(image, each) + layout.BINARY_SIZE
        image = put(image, start, text[:size].ljust(size, b"\0"))
        image = sealed(image, each)
    return image


def with_json(image: bytes, raw: Mapping[str, Any], which: Iterable[Which] = BOTH) -> bytes:
    """Another JSON object."""
    text = json.dumps(raw, separators=(",", ":"), ensure_ascii=False)
    return with_text(image, text.encode(errors="surrogatepass"), which)


def edited(image: bytes, edit: Edit, which: Iterable[Which] = BOTH) -> bytes:
    """The JSON after ``edit``, which changes the object that it is given."""
    for each in which:
        raw = copying.deepcopy(json_of(image, each))
        edit(raw)
        image = with_json(image, raw, [each])
    return image


def with_fields(image: bytes, which: Iterable[Which] = BOTH, **fields: object) -> bytes:
    """Other fields of the binary header."""
    for each in which:
        packed = layout.BINARY.pack(*(fields_of(image, each) | fields).values())
        start = offset_of(image, each)
        image = sealed(put(image, start, packed), each, start)
    return image


def newer(image: bytes, which: Iterable[Which], by: int = 1) -> bytes:
    """A higher sequence number."""
    for each in which:
        image = with_fields(image, [each], seqid=fields_of(image, each)["seqid"] + by)
    return image


def sealed(image: bytes, which: Which, start: int | None = None) -> bytes:
    """With a right checksum, if the algorithm is one that we know."""
    start = offset_of(image, which) if start is None else start
    _, _, size, *_, csum_alg = layout.BINARY.unpack_from(image, start)[:6]
    name = CHECKSUMS.get(csum_alg.rstrip(b"\0").decode("latin-1").lower())
    if name is None:
        return image
    blank = put(image[start : start + size], layout.CSUM_OFFSET, bytes(layout.CSUM_SIZE))
    csum = hashlib.new(name, blank).digest().ljust(layout.CSUM_SIZE, b"\0")
    return put(image, start + layout.CSUM_OFFSET, csum)


def unsealed(image: bytes, which: Which) -> bytes:
    """With a wrong checksum."""
    return flip(image, (offset_of(image, which) + layout.CSUM_OFFSET) * 8)


def erased(image: bytes, which: Which) -> bytes:
    """Without that copy."""
    size = hdr_size_of(image)
    return put(image, offset_of(image, which), bytes(size))


def torn(image: bytes, after: bytes, which: Which, written: int = layout.BINARY_SIZE) -> bytes:
    """One copy half written: the first ``written`` bytes are those of ``after``."""
    start = offset_of(image, which)
    return put(image, start, after[start : start + written])


def token(image: bytes, keyslot: int | None, **members: object) -> Json:
    """The JSON of a token of ours, of generation 1, with the right fingerprint."""
    raw: Json = {"type": TOKEN_TYPE, "keyslots": [] if keyslot is None else [str(keyslot)], "version": 1}
    raw |= {"name": "backup", "generation": 1, "state": "active", "rotated_at": "2026-01-02T03:04:05Z", "data": {}}
    if keyslot is not None:
        raw["fingerprint"] = fingerprint(json_of(image)["keyslots"][str(keyslot)])
    return raw | members


def with_token(image: bytes, keyslot: int | None, number: int = 0, **members: object) -> bytes:
    """With a token of ours on ``keyslot``; ``members`` override what ``token`` gives it."""
    written = token(image, keyslot, **members)
    return edited(image, lambda raw: raw["tokens"].update({str(number): written}))


def intent(*extents: Extent) -> list[dict[str, str]]:
    """The member ``wipe`` of a token."""
    return [{"offset": str(extent.offset), "size": str(extent.size)} for extent in extents]


def keyslot_removed(image: bytes, keyslot: int) -> bytes:
    """As another tool removes a keyslot: gone from digests and tokens, tokens left behind."""

    def edit(raw: Json) -> None:
        del raw["keyslots"][str(keyslot)]
        for owner in (*raw["digests"].values(), *raw["tokens"].values()):
            owner["keyslots"] = [slot for slot in owner["keyslots"] if slot != str(keyslot)]

    return edited(image, edit)


def pair_of(image: bytes) -> Pair:
    """Both copies, parsed."""
    return parse_pair(image)


def view_of(image: bytes) -> DeviceView:
    """What the image means to us."""
    return view(parse_pair(image))
