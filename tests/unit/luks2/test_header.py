# SPDX-License-Identifier: GPL-2.0-or-later
from dataclasses import replace

import pytest

from luksrotd.errors import FormatError
from luksrotd.luks2 import header, layout
from luksrotd.luks2.layout import Which
from tests.support import forge
from tests.support.simengine import HDR_SIZE, UUID, make_volume

IMAGE = make_volume([b"a"])


def copy_of(which: Which) -> bytes:
    start = forge.offset_of(IMAGE, which)
    return IMAGE[start : start + HDR_SIZE]


@pytest.mark.parametrize("which", Which)
def test_decodes_the_fields(which):
    decoded = header.decode(copy_of(which), which, forge.offset_of(IMAGE, which))
    assert (decoded.which, decoded.hdr_size, decoded.seqid, decoded.uuid) == (which, HDR_SIZE, 3, UUID)
    assert decoded.hdr_offset == forge.offset_of(IMAGE, which)
    assert decoded.json_size == HDR_SIZE - layout.BINARY_SIZE


@pytest.mark.parametrize("which", Which)
def test_encode_is_the_inverse_of_decode(which):
    copy = copy_of(which)
    decoded = header.decode(copy, which, forge.offset_of(IMAGE, which))
    assert header.encode(decoded, copy[layout.BINARY_SIZE :].rstrip(b"\0")) == copy


def test_encode_leaves_room_for_the_terminating_zero():
    decoded = header.decode(copy_of(Which.PRIMARY), Which.PRIMARY, 0)
    fits = header.encode(decoded, b"x" * (decoded.json_size - 1))
    assert (len(fits), fits[-1]) == (HDR_SIZE, 0)
    with pytest.raises(FormatError, match="do not fit"):
        header.encode(decoded, b"x" * decoded.json_size)


def test_the_other_copy_is_not_taken_for_this_one():
    with pytest.raises(FormatError, match="primary LUKS2 header: the magic is missing"):
        header.decode(copy_of(Which.SECONDARY), Which.PRIMARY, 0)


@pytest.mark.parametrize("size", [0, 1, 511])
def test_a_short_block_is_refused(size):
    with pytest.raises(FormatError, match=f"only {size} bytes"):
        header.decode(copy_of(Which.PRIMARY)[:size], Which.PRIMARY, 0)


def test_every_byte_of_the_copy_is_in_the_checksum():
    copy = copy_of(Which.PRIMARY)
    decoded = header.decode(copy, Which.PRIMARY, 0)
    header.verify_checksum(decoded, copy)
    in_csum = range(layout.CSUM_OFFSET, layout.FIELDS_SIZE)
    for offset in (0, 263, 447, 512, 4095, 4096, HDR_SIZE - 1):
        assert offset not in in_csum
        with pytest.raises(FormatError, match="checksum does not match"):
            header.verify_checksum(decoded, forge.flip(copy, offset * 8))


@pytest.mark.parametrize("byte", [0, 31])
def test_every_byte_of_the_digest_counts(byte):
    decoded = header.decode(copy_of(Which.PRIMARY), Which.PRIMARY, 0)
    wrong = replace(decoded, csum=forge.flip(decoded.csum, byte * 8))
    with pytest.raises(FormatError, match="checksum does not match"):
        header.verify_checksum(wrong, copy_of(Which.PRIMARY))


def test_only_as_many_bytes_are_compared_as_the_digest_has():
    decoded = header.decode(copy_of(Which.PRIMARY), Which.PRIMARY, 0)
    noisy = replace(decoded, csum=decoded.csum[:32] + b"\xff" * 32)
    header.verify_checksum(noisy, copy_of(Which.PRIMARY))


def test_an_unknown_algorithm_is_named():
    with pytest.raises(FormatError, match="'crc32' is unknown"):
        header.checksum("crc32", copy_of(Which.PRIMARY), Which.PRIMARY)


def test_text_ends_at_the_first_zero_and_is_never_undecodable():
    image = forge.with_fields(IMAGE, label=b"one\0two".ljust(48, b"\0"), subsystem=b"\xff\xfe".ljust(48, b"\0"))
    decoded = header.decode(image, Which.PRIMARY, 0)
    assert (decoded.label, decoded.subsystem) == ("one", "\ufffd\ufffd")


def test_keyslot_areas_are_as_long_as_libcryptsetup_makes_them():
    # luksFormat with a 512-bit and a 256-bit volume key.
    assert [layout.keyslot_area_size(size) for size in (64, 32, 1)] == [258048, 131072, 4096]


def test_each_copy_is_the_other_of_the_other():
    assert [which.other for which in Which] == [Which.SECONDARY, Which.PRIMARY]


def test_a_copy_like_another_one_keeps_what_is_no_text():
    image = forge.with_fields(IMAGE, label=b"\xff\xfe label", subsystem=b"\xff")
    raw = image[:HDR_SIZE]
    like = header.decode(raw, Which.PRIMARY, 0)
    made = header.derive(like, raw, Which.SECONDARY, b"s" * 64, 99, b"{}")
    fields = forge.fields_of(raw + made, Which.SECONDARY)
    kept = {
        name: value for name, value in forge.fields_of(raw, Which.PRIMARY).items() if name in ("label", "subsystem")
    }
    assert kept.items() <= fields.items()
    decoded = header.decode(made, Which.SECONDARY, HDR_SIZE)
    header.verify_checksum(decoded, made)
    assert (decoded.seqid, decoded.salt, made[layout.BINARY_SIZE :][:3]) == (99, b"s" * 64, b"{}\0")


@pytest.mark.parametrize("seqid", [-1, 2**64])
def test_a_sequence_number_has_64_bits(seqid):
    raw = copy_of(Which.PRIMARY)
    with pytest.raises(FormatError, match="out of range"):
        header.derive(header.decode(raw, Which.PRIMARY, 0), raw, Which.PRIMARY, b"", seqid, b"{}")
