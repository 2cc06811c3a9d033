# SPDX-License-Identifier: GPL-2.0-or-later
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luksrotd.errors import ConsistencyError, NeedsReconcile, Outcome, RequirementsPresent
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import Which
from luksrotd.rotation.change import Change
from luksrotd.rotation.scrub import free_blocks, scrub
from tests.support import forge
from tests.support.planning import KEEP, OLD, planned
from tests.support.simengine import make_volume

#: Keyslots at 32768 and 36864; free from there to the end of the area at 65536.
PLAIN = make_volume([KEEP, OLD])
FREE = Extent(40960, 24576)


def test_I4_only_what_no_copy_references_is_free():
    assert free_blocks(forge.view_of(PLAIN)) == (FREE,)
    # A copy alone is enough to keep an area.
    behind = forge.newer(forge.keyslot_removed(PLAIN, 1), forge.BOTH)
    for which in Which:
        start = forge.offset_of(PLAIN, which)
        differing = forge.put(behind, start, PLAIN[start : start + 16384])
        assert free_blocks(forge.view_of(differing)) == (FREE,)
    assert free_blocks(forge.view_of(behind)) == (Extent(36864, 28672),)


def test_I4_a_block_of_which_a_byte_is_referenced_is_not_free():
    image = forge.edited(PLAIN, lambda raw: raw["keyslots"]["1"]["area"].update(offset="45057", size="4095"))
    assert free_blocks(forge.view_of(image)) == (Extent(36864, 8192), Extent(49152, 16384))


def test_a_full_keyslots_area_leaves_nothing():
    full = make_volume([KEEP, OLD], areas=2)
    assert scrub(forge.view_of(full), 0) == Change()


def test_it_goes_on_where_it_was():
    seen = forge.view_of(PLAIN)
    assert scrub(seen, 0, 8192) == Change(wipe=(Extent(40960, 8192),))
    assert scrub(seen, 49152, 8192) == Change(wipe=(Extent(49152, 8192),))
    assert scrub(seen, 57344, 1 << 20) == Change(wipe=(Extent(57344, 8192),))
    assert scrub(seen, 65536) == Change()


@given(st.sets(st.integers(0, 15)), st.integers(1, 20))
def test_piece_by_piece_all_that_is_free_is_overwritten_once(taken, blocks):
    """``taken``: which of sixteen places a keyslot is in."""
    image = make_volume([KEEP], areas=17)

    def edit(raw):
        for number, place in enumerate(sorted(taken), 1):
            slot = {**raw["keyslots"]["0"], "area": {**raw["keyslots"]["0"]["area"]}}
            slot["area"]["offset"] = str(32768 + (place + 1) * 4096)
            raw["keyslots"][str(number)] = slot
            raw["digests"]["0"]["keyslots"].append(str(number))

    seen = forge.view_of(forge.edited(image, edit))
    start, found = 0, []
    while wipe := scrub(seen, start, blocks * 4096).wipe:
        assert sum(extent.size for extent in wipe) <= blocks * 4096
        found += [block for extent in wipe for block in range(extent.offset, extent.end, 4096)]
        start = wipe[-1].end
    assert found == [32768 + (place + 1) * 4096 for place in range(16) if place not in taken]


def test_it_waits_until_the_volume_is_in_order():
    for image, refusal in (
        (forge.newer(PLAIN, [Which.PRIMARY]), NeedsReconcile),
        (forge.with_token(PLAIN, 1, wipe=forge.intent(FREE)), NeedsReconcile),
        (
            forge.edited(PLAIN, lambda raw: raw["config"].update(requirements={"mandatory": ["x"]})),
            RequirementsPresent,
        ),
    ):
        with pytest.raises(refusal):
            scrub(forge.view_of(image), 0)


def test_I9_no_header_is_written():
    plan = planned(PLAIN, scrub(forge.view_of(PLAIN), 0))
    assert plan.base == plan.committed == plan.final
    assert plan.seqid_before == plan.seqid_after
    assert [write.extent for write in plan.writes] == [FREE]


def test_I4_a_plan_that_overwrites_a_keyslot_is_refused():
    with pytest.raises(ConsistencyError, match="in use"):
        planned(PLAIN, Change(wipe=(Extent(36864, 8192),)))


def test_a_scrub_that_failed_has_not_changed_the_volume():
    plan = planned(PLAIN, scrub(forge.view_of(PLAIN), 0))
    assert plan.outcome(plan.base) is Outcome.UNCHANGED
    assert plan.outcome(b"else") is Outcome.UNKNOWN
