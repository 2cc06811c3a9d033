# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever is on the disk: an error of ours or a volume, in bounded time, and never a write where none may go."""

import json
from contextlib import suppress

from hypothesis import example, given
from hypothesis import strategies as st

from luksrotd.errors import FormatError, LuksrotdError
from luksrotd.luks2 import jsontext, layout, metadata
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.pair import parse_pair
from luksrotd.rotation import keys, policy, reconcile
from luksrotd.rotation.reconcile import Action
from luksrotd.rotation.view import DeviceView, view
from tests.support import forge
from tests.support.planning import ENROLL, ROTATE, after, planned, volume
from tests.support.simengine import HDR_SIZE

IMAGE = forge.with_token(volume(), 0, 3, name="spare", wipe=forge.intent(Extent(45056, 4096)))
HEADERS = 2 * HDR_SIZE
USED = 2048  # bytes of the JSON area that have text in them, and some behind
RAW = forge.json_of(IMAGE)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["0", "1", "4096"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.sampled_from("012"), inner, max_size=3)
    ),
    max_leaves=8,
)


def paths(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The way to every value in a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, child in children for found in paths(child, (*path, key)))]


PATHS = [path for path in paths(RAW) if path]


def replaced(raw, path, value):
    raw = json.loads(json.dumps(raw))
    holder = raw
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return raw


def use(seen: DeviceView) -> None:
    """Everything that is decided from a header; only errors of ours may come out."""
    findings = reconcile.diagnose(seen)
    mendable = any(finding.action is Action.REPAIR for finding in findings)
    assert mendable == bool(reconcile.needs_heal(seen) or reconcile.repair(seen)), findings
    assert all(len(finding.message) < 3000 for finding in findings)
    for decide, request in ((keys.enroll, ENROLL), (keys.rotate, ROTATE)):
        with suppress(LuksrotdError):
            policy.check_retirement(seen, decide(seen, request))  # type: ignore[operator]  # each with its own request


def used(image: bytes) -> DeviceView | None:
    try:
        seen = view(parse_pair(image))
    except LuksrotdError:
        return None
    use(seen)
    return seen


@given(st.integers(0, HEADERS * 8 - 1))
@example(6 * 8 + 7)
@example((HDR_SIZE + 4096) * 8)
def test_a_flipped_bit_changes_nothing_that_is_believed(bit):
    seen = used(forge.flip(IMAGE, bit))
    # The checksum is of one copy, so the other one is in force; only a version or an algorithm that may be in force
    # without us knowing it make us refuse the volume.
    fields = range(6, 8), range(72, 104), range(HDR_SIZE + 72, HDR_SIZE + 104)
    assert seen is not None or any(bit // 8 in field for field in fields)
    assert seen is None or seen.metadata.raw == RAW


@given(st.integers(0, len(IMAGE)))
@example(forge.pair_of(IMAGE).length)
@example(forge.pair_of(IMAGE).length - 1)
def test_a_device_may_end_anywhere(size):
    seen = used(IMAGE[:size])
    assert (seen is not None) == (size >= forge.pair_of(IMAGE).length)


@given(st.integers(0, HEADERS // 512 - 1), st.binary(min_size=512, max_size=512))
def test_a_sector_of_garbage_leaves_the_other_copy(sector, garbage):
    seen = used(forge.put(IMAGE, sector * 512, garbage))
    assert seen is None or seen.metadata.raw == RAW


@given(st.binary(max_size=600), st.integers(0, USED))
def test_any_bytes_in_a_json_area_with_a_right_checksum(text, at):
    used(forge.with_text(IMAGE, forge.put(forge.text_of(IMAGE), at, text)))


@given(st.sampled_from(PATHS), json_values)
def test_any_value_in_any_place_of_the_metadata(path, value):
    raw = replaced(RAW, path, value)
    used(forge.with_text(IMAGE, json.dumps(raw).encode()))


@given(st.dictionaries(st.sampled_from([*RAW, "x"]), json_values))
def test_arbitrary_objects_raise_only_format_errors(raw):
    with suppress(FormatError):
        metadata.validate(raw, HDR_SIZE)


@given(json_values)
def test_what_is_loaded_can_be_written_again(value):
    text = json.dumps({"x": value}).encode()
    try:
        loaded = jsontext.load(text + b"\0")
    except FormatError:
        return
    assert jsontext.load(metadata.serialise(loaded) + b"\0") == loaded
    assert all(depth <= jsontext.DEPTH_MAX and not jsontext.trouble(part) for part, depth in jsontext.walk(loaded))


@given(st.from_regex(r"-?(0|[1-9][0-9]{0,24})(\.[0-9]{1,24})?([eE][-+]?[0-9]{1,4})?", fullmatch=True))
def test_no_number_passes_that_json_c_would_change(number):
    try:
        loaded = jsontext.load(b'{"x":[0, %s]}\0' % number.encode())
    except FormatError:
        return
    assert not jsontext.trouble(loaded["x"][1])


offsets = st.integers(0, 18).map(lambda block: block * 4096) | st.integers(0, 2**64)
ranges = st.lists(st.fixed_dictionaries({"offset": offsets.map(str), "size": offsets.map(str)}), max_size=4)


@given(ranges, ranges, st.booleans())
def test_I4_no_intent_makes_us_write_where_we_must_not(first, second, orphan):
    image = forge.with_token(volume(), 1, wipe=first)
    image = forge.with_token(image, 0, 5, name="spare", wipe=second)
    if orphan:
        image = forge.keyslot_removed(image, 1)
    seen = forge.view_of(image)
    use(seen)
    change = reconcile.repair(seen)
    if change is None:
        return
    plan = planned(image, change)
    allowed = [Extent(0, HEADERS), *seen.free]
    assert all(any(space.contains(write.extent) for space in allowed) for write in plan.writes)
    mended = forge.view_of(after(image, plan))
    assert reconcile.repair(mended) is None  # I7
    assert mended.metadata.keyslots == seen.metadata.keyslots


def test_as_many_objects_as_we_take_are_used_and_one_more_is_refused():
    """The checks compare objects with each other: their number, not the 4 MiB of a header, bounds what that costs."""
    raw = json.loads(json.dumps(RAW))
    raw["tokens"] = dict.fromkeys(map(str, range(layout.OBJECTS_MAX)), raw["tokens"]["0"])
    raw["digests"]["0"]["keyslots"] = ["0", "1"] * (layout.OBJECTS_MAX // 2)
    image = forge.with_json(grown(IMAGE, raw), raw)
    assert used(image) is not None
    raw["tokens"][str(layout.OBJECTS_MAX)] = raw["tokens"]["0"]
    assert used(forge.with_json(image, raw)) is None


def grown(image: bytes, raw: dict) -> bytes:
    """The volume with the largest header; ``raw`` is changed to fit."""
    size, shift = 4096 * 1024, 2 * (4096 * 1024 - HDR_SIZE)
    raw["config"]["json_size"] = str(size - 4096)
    for area in (slot["area"] for slot in raw["keyslots"].values()):
        area["offset"] = str(int(area["offset"]) + shift)
    raw["segments"]["0"]["offset"] = str(int(raw["segments"]["0"]["offset"]) + shift)
    image = image[:HDR_SIZE].ljust(size, b"\0") + image[HDR_SIZE:HEADERS].ljust(size, b"\0") + image[HEADERS:]
    image = forge.put(image, 8, size.to_bytes(8, "big"))
    image = forge.with_fields(image, [forge.Which.PRIMARY], hdr_size=size)
    return forge.with_fields(image, [forge.Which.SECONDARY], hdr_size=size, hdr_offset=size)
