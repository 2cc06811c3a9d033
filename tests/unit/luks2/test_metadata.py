# SPDX-License-Identifier: GPL-2.0-or-later
"""What the typed view shows; what is refused is in ``tests/vectors``."""

import pytest

from luksrotd.errors import FormatError
from luksrotd.luks2 import layout, metadata
from luksrotd.luks2.areas import Extent
from tests.support import forge
from tests.support.simengine import HDR_SIZE, make_volume

IMAGE = make_volume([b"a", b"b"])
AREA = layout.AREA_ALIGNMENT


def parsed(edit: forge.Edit = lambda raw: None) -> metadata.Metadata:
    raw = forge.json_of(IMAGE)
    edit(raw)
    return metadata.validate(raw, HDR_SIZE)


def test_the_typed_view():
    found = parsed()
    assert sorted(found.keyslots) == [0, 1]
    assert found.areas == (Extent(2 * HDR_SIZE, AREA), Extent(2 * HDR_SIZE + AREA, AREA))
    assert found.keyslots_area == Extent(2 * HDR_SIZE, 8 * AREA)
    assert found.keyslots[1].kdf_salt == forge.json_of(IMAGE)["keyslots"]["1"]["kdf"]["salt"]
    assert found.keyslots[0].priority == 1
    assert found.segments[0].size is None
    assert found.config.mandatory == ()


def test_areas_are_ascending_whatever_the_order_of_the_keyslots():
    def swap(raw):
        first, second = raw["keyslots"]["0"], raw["keyslots"]["1"]
        first["area"], second["area"] = second["area"], first["area"]

    assert list(parsed(swap).areas) == sorted(parsed().areas)


def test_a_keyslot_opens_the_volume_only_through_a_digest_with_a_segment():
    def unbind(raw):
        raw["digests"]["0"]["keyslots"] = ["0"]
        raw["digests"]["1"] = dict(raw["digests"]["0"], keyslots=["1"], segments=[])

    assert [parsed(unbind).opens_volume(number) for number in (0, 1, 2)] == [True, False, False]


def test_requirements_are_seen():
    assert parsed(lambda raw: raw["config"].update(requirements={"mandatory": ["x", "y"]})).config.mandatory == (
        "x",
        "y",
    )
    assert parsed(lambda raw: raw["config"].update(requirements={})).config.mandatory == ()


def test_serialise_is_compact_and_keeps_order_and_text():
    assert metadata.serialise({"b": "é", "a": [1, 2]}) == '{"b":"é","a":[1,2]}'.encode()


def test_messages_do_not_repeat_hostile_text_at_length():
    with pytest.raises(FormatError) as caught:
        parsed(lambda raw: raw["keyslots"]["0"]["kdf"].update(type="x" * 10_000))
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("kind", ["keyslots", "tokens", "digests", "segments"])
def test_more_objects_than_any_tool_makes_are_refused(kind):
    def crowd(raw):
        raw[kind] = {str(number): {} for number in range(layout.OBJECTS_MAX + 1)}

    with pytest.raises(FormatError, match=f"{kind}: there are more than"):
        parsed(crowd)


def test_more_references_than_any_tool_makes_are_refused():
    with pytest.raises(FormatError, match="more than 128 keyslots"):
        parsed(lambda raw: raw["digests"]["0"].update(keyslots=["0"] * (layout.OBJECTS_MAX + 1)))
