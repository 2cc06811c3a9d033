# SPDX-License-Identifier: GPL-2.0-or-later
"""What is written is what is read."""

import json
from dataclasses import replace
from datetime import datetime

from hypothesis import given
from hypothesis import strategies as st

from luksrotd.luks2 import header, layout, metadata
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.header import BinaryHeader
from luksrotd.luks2.layout import Which
from luksrotd.luks2.metadata import Token
from luksrotd.rotation import token as tokens
from luksrotd.rotation.protocol import BLOCK, header_writes
from luksrotd.rotation.token import BackupToken, KeyState
from tests.support import forge
from tests.support.simengine import HDR_SIZE, make_volume

IMAGE = make_volume([b"a", b"b"])

texts = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | texts
    | st.floats(allow_nan=False, allow_infinity=False)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
objects = st.dictionaries(texts, values, max_size=4)
extents = st.builds(Extent, st.integers(0, 2**40), st.integers(1, 2**40))


def fitting(size: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=size)


headers = st.builds(
    BinaryHeader,
    which=st.sampled_from(Which),
    hdr_size=st.just(HDR_SIZE),
    seqid=st.integers(0, 2**64 - 1),
    label=fitting(48),
    csum_alg=st.sampled_from(sorted(header.CHECKSUMS)),
    salt=st.binary(min_size=64, max_size=64),
    uuid=fitting(40),
    subsystem=fitting(48),
    csum=st.just(b""),
)


@given(headers, st.binary(max_size=500))
def test_a_binary_header(head, text):
    copy = header.encode(head, text)
    assert len(copy) == HDR_SIZE
    found = header.decode(copy, head.which, head.hdr_offset)
    header.verify_checksum(found, copy)
    assert replace(found, csum=b"") == head
    assert copy[layout.BINARY_SIZE :].rstrip(b"\0") == text.rstrip(b"\0")


@given(st.sampled_from(["", "config", "keyslots/0", "keyslots/1", "segments/0", "digests/0"]), objects)
def test_unknown_members_survive(place, members):
    members = {f"x-{name}": value for name, value in members.items()}

    def edit(raw):
        for part in filter(None, place.split("/")):
            raw = raw[part]
        raw.update(members)

    image = forge.edited(IMAGE, edit)
    found = forge.pair_of(image).winner.metadata
    assert found.raw == forge.json_of(image)
    assert metadata.parse(metadata.serialise(found.raw) + b"\0", HDR_SIZE) == found


numbers = st.lists(st.integers(0, 31), max_size=3, unique=True).map(tuple)
moments = st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2999, 1, 1)).map(  # noqa: DTZ001 - utc() wants no zone
    lambda moment: tokens.utc(moment.replace(microsecond=0))
)
ours = st.builds(
    BackupToken,
    id=st.just(1),
    keyslots=numbers,
    name=st.from_regex(tokens.NAME, fullmatch=True),
    generation=st.integers(1, tokens.GENERATION_MAX),
    state=st.sampled_from(KeyState),
    rotated_at=moments,
    data=objects,
    wipe=st.lists(extents, max_size=3).map(tuple),
    fingerprint=st.none() | texts.filter(bool),
    expires_at=st.just("") | moments,
    retires=st.none() | numbers,
    group=st.none()
    | st.builds(tokens.Group, st.from_regex(tokens.NAME, fullmatch=True), st.integers(1, tokens.GROUP_MAX)),
    adopted=st.none() | objects,
    extra=objects.map(lambda extra: {f"x-{member}": value for member, value in extra.items()}),
)


@given(ours)
def test_a_token(token):
    raw = json.loads(json.dumps(tokens.body(token)))
    assert tokens.parse(Token(1, "luksrotd", token.keyslots, raw)) == token
    cleared = Token(1, "luksrotd", token.keyslots, tokens.with_intent(raw, ()))
    assert tokens.parse(cleared) == replace(token, wipe=())


@given(moments)
def test_a_time(text):
    moment = tokens.moment(text)
    assert moment == datetime.fromisoformat(text)
    assert moment is not None
    assert tokens.utc(moment) == text


@given(st.lists(extents, min_size=1, max_size=3).map(tuple))
def test_a_wipe_record(wipe):
    raw = json.loads(json.dumps(tokens.record(wipe)))
    assert tokens.parse_record(Token(1, "luksrotd-wipe", (), raw)).wipe == wipe


blocks = st.lists(st.sampled_from([b"a" * BLOCK, b"b" * BLOCK]), min_size=4, max_size=8)


@given(blocks, blocks, st.integers(0, 3))
def test_header_writes_make_the_one_the_other_and_touch_nothing_else(before, after, at):
    length = min(len(before), len(after))
    old, new = b"".join(before[:length]), b"".join(after[:length])
    image = bytearray(b"?" * at * BLOCK + old + b"?" * BLOCK)
    for write in header_writes(old, new, at * BLOCK):
        start = write.offset - at * BLOCK
        assert old[start : start + BLOCK] != new[start : start + BLOCK]
        image[write.offset : write.extent.end] = write.data
    assert bytes(image) == b"?" * at * BLOCK + new + b"?" * BLOCK
