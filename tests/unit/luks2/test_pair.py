# SPDX-License-Identifier: GPL-2.0-or-later
"""Which copy is in force, beside the vectors: those ask libcryptsetup too."""

import pytest

from luksrotd.errors import DeviceError, FormatError, NotLuks2, UnknownDevice
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import Which
from luksrotd.luks2.pair import BadCopy, HeaderCopy, is_lost, parse_pair, read_pair
from tests.support import forge
from tests.support.simengine import HDR_SIZE, make_volume

IMAGE = make_volume([b"a", b"b"])
OTHER = {"type": "x", "keyslots": []}


def other_token(which):
    return forge.edited(IMAGE, lambda raw: raw["tokens"].update({"5": OTHER}), which)


def test_a_healthy_pair():
    pair = parse_pair(IMAGE)
    assert pair.agree
    assert pair.loser is None
    assert pair.winner.header.which is Which.PRIMARY
    assert (pair.hdr_size, pair.length, pair.raw) == (HDR_SIZE, 2 * HDR_SIZE + 8 * 4096, IMAGE[: 2 * HDR_SIZE])
    assert pair.referenced == pair.winner.metadata.areas


@pytest.mark.parametrize("image", [IMAGE, forge.unsealed(IMAGE, Which.PRIMARY)])
def test_the_beginning_of_an_image_is_enough_if_zeros_follow(image):
    headers = image[: 2 * HDR_SIZE]
    padded = headers.ljust(len(image), b"\0")
    assert parse_pair(headers, len(image)) == parse_pair(padded)
    with pytest.raises(FormatError, match="the device has"):
        parse_pair(headers, len(headers))
    assert len(parse_pair(IMAGE[:HDR_SIZE], len(image)).valid) == 1


@pytest.mark.parametrize("which", Which)
def test_the_newer_copy_wins_and_the_other_is_to_be_rewritten(which):
    pair = parse_pair(forge.newer(IMAGE, [which]))
    assert (pair.winner.header.which, pair.loser) == (which, which.other)
    assert not pair.agree
    assert len(pair.valid) == 2


@pytest.mark.parametrize("which", Which)
def test_the_valid_copy_wins(which):
    pair = parse_pair(forge.unsealed(forge.newer(IMAGE, [which]), which))
    assert (pair.winner.header.which, pair.loser) == (which.other, which)
    assert len(pair.valid) == 1


def test_equal_numbers_and_different_content_do_not_agree():
    pair = parse_pair(other_token([Which.SECONDARY]))
    assert (pair.winner.header.which, pair.loser) == (Which.PRIMARY, Which.SECONDARY)
    pair = parse_pair(forge.with_fields(IMAGE, [Which.SECONDARY], label=b"x"))
    assert pair.loser is Which.SECONDARY


def test_salt_and_spelling_do_not_count_as_content():
    assert parse_pair(forge.with_fields(IMAGE, [Which.SECONDARY], salt=b"x" * 64)).agree
    assert parse_pair(forge.with_text(IMAGE, forge.text_of(IMAGE) + b"\n ", [Which.SECONDARY])).agree


def test_I4_areas_of_both_copies_are_referenced():
    # The newer copy has given up keyslot 1, the older one still has it.
    newer = forge.newer(forge.keyslot_removed(IMAGE, 1), [Which.PRIMARY])
    image = forge.put(newer, HDR_SIZE, IMAGE[HDR_SIZE : 2 * HDR_SIZE])
    pair = parse_pair(image)
    assert len(pair.winner.metadata.areas) == 1
    assert pair.referenced == (Extent(32768, 4096), Extent(36864, 4096))


def test_a_bad_copy_says_why():
    copy = parse_pair(forge.unsealed(IMAGE, Which.SECONDARY)).secondary
    assert isinstance(copy, BadCopy)
    assert (copy.present, "checksum" in copy.reason) == (True, True)
    copy = parse_pair(forge.erased(IMAGE, Which.SECONDARY)).secondary
    assert isinstance(copy, BadCopy)
    assert not copy.present


def test_both_copies_of_the_usual_size_are_read_at_once():
    reads = []

    def read(offset, length):
        reads.append((offset, length))
        return IMAGE[offset : offset + length]

    assert read_pair(read, len(IMAGE)) == parse_pair(IMAGE)
    assert reads == [(0, 2 * HDR_SIZE)]


def test_what_cannot_be_read_does_no_harm_where_it_is_not_needed():
    image = forge.erased(IMAGE, Which.PRIMARY)

    def read(offset, length):
        if offset <= 8192 < offset + length:
            raise DeviceError("cannot read: simulated")
        return image[offset : offset + length]

    with pytest.raises(DeviceError):
        read_pair(read, len(image))  # the place of both copies, for a transaction
    assert not is_lost(read, len(image))


def test_the_secondary_is_found_without_the_primary():
    pair = parse_pair(forge.erased(IMAGE, Which.PRIMARY))
    assert isinstance(pair.secondary, HeaderCopy)
    assert pair.hdr_size == HDR_SIZE


def test_the_error_names_the_first_trace_that_the_scan_has_found():
    image = forge.erased(forge.unsealed(IMAGE, Which.SECONDARY), Which.PRIMARY)
    image = forge.put(image, 32768, b"SKUL\xba\xbe")
    with pytest.raises(FormatError, match=r"primary.*magic is missing; .*secondary.*checksum does not match"):
        parse_pair(image)


def test_a_luks1_header_over_an_old_secondary_is_not_a_damaged_primary():
    with pytest.raises(NotLuks2):
        parse_pair(forge.put(IMAGE, 0, b"LUKS\xba\xbe\0\1"))


def test_a_later_version_over_an_old_secondary_is_not_a_damaged_primary():
    with pytest.raises(FormatError, match="version 3"):
        parse_pair(forge.put(IMAGE, 0, b"LUKS\xba\xbe\0\3"))


@pytest.mark.parametrize("which", Which)
def test_a_copy_that_only_we_refuse_is_not_passed_over_silently(which):
    image = forge.newer(IMAGE, [which])
    image = forge.with_text(image, forge.text_of(image).replace(b"{", b"{/**/", 1), [which])
    pair = parse_pair(image)
    assert pair.loser is which
    assert "not JSON" in pair.doubt


def test_a_copy_that_only_we_refuse_is_passed_over_where_it_could_not_win():
    image = forge.newer(forge.with_text(IMAGE, b"{/**/}", [Which.SECONDARY]), [Which.PRIMARY])
    assert parse_pair(image).loser is Which.SECONDARY
    assert parse_pair(image).doubt == ""
    assert parse_pair(IMAGE).doubt == ""
    # With equal numbers libcryptsetup takes the primary.
    assert parse_pair(forge.with_text(IMAGE, b"{/**/}", [Which.SECONDARY])).loser is Which.SECONDARY


def test_reads_stay_on_the_device_and_within_bounds():
    image = forge.erased(forge.unsealed(IMAGE, Which.SECONDARY), Which.PRIMARY)
    for offset in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        # Everywhere the scan looks, a copy that wants to be read whole.
        size = offset * 1024
        image = image.ljust(2 * size, b"\0")
        image = forge.put(image, size, IMAGE[HDR_SIZE : HDR_SIZE + 512])
        image = forge.put(image, size + 8, size.to_bytes(8, "big"))
        image = forge.put(image, size + 256, size.to_bytes(8, "big"))
    total = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal total
        assert 0 <= offset <= offset + length <= len(image)
        total += length
        return image[offset : offset + length]

    with pytest.raises(FormatError):
        read_pair(read, len(image))
    assert total < 20 * 1024 * 1024


def test_a_short_read_is_an_error_of_the_device():
    with pytest.raises(DeviceError, match="only 0 came"):
        read_pair(lambda offset, length: b"", len(IMAGE))


def test_no_trace_of_luks():
    with pytest.raises(UnknownDevice):
        parse_pair(bytes(65536))


@pytest.mark.parametrize(
    ("image", "lost"),
    [
        (bytes(len(IMAGE)), True),
        (b"", True),
        (forge.unsealed(forge.erased(IMAGE, Which.SECONDARY), Which.PRIMARY), True),
        (IMAGE, False),
        (forge.erased(IMAGE, Which.PRIMARY), False),
        # Only we refuse it, maybe.
        (forge.with_text(IMAGE, b"{}"), False),
        (forge.erased(forge.with_text(IMAGE, b"{}"), Which.PRIMARY), False),
    ],
)
def test_a_header_is_lost_when_no_copy_has_a_right_checksum(image, lost):
    assert is_lost(lambda offset, length: image[offset : offset + length], len(image)) is lost


def test_another_version_is_not_lost():
    with pytest.raises(NotLuks2):
        is_lost(lambda offset, length: b"LUKS\xba\xbe\0\1".ljust(length, b"\0"), 1 << 20)
