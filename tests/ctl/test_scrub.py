# SPDX-License-Identifier: GPL-2.0-or-later
"""scrub, on real headers with the usual 16 MiB of keyslot space, and a large one in pieces."""

import json

import pytest

from tests.ctl.conftest import BACKUP, loop_device, works
from tests.support.makeimage import KEY, cryptsetup_opens, luks_dump_json, make_image

BLOCK = 4096


def keyslot_space(image):
    """All blocks of the keyslots area, and those of them that a keyslot is in."""
    dump = luks_dump_json(image)
    start = 2 * (int(dump["config"]["json_size"]) + BLOCK)
    space = set(range(start, start + int(dump["config"]["keyslots_size"]), BLOCK))
    areas = [(int(slot["area"]["offset"]), int(slot["area"]["size"])) for slot in dump["keyslots"].values()]
    return space, {block for offset, size in areas for block in range(offset, offset + size, BLOCK)}


def changed(before, after):
    return {at for at in range(0, len(before), BLOCK) if before[at : at + BLOCK] != after[at : at + BLOCK]}


@pytest.mark.parametrize("sector_size", [None, 512, 4096], ids=["image", "512", "4096"])
def test_everything_unreferenced_changes_and_nothing_else(enrolled, sector_size):
    space, taken = keyslot_space(enrolled)
    assert len(space) * BLOCK > 15 * 1024 * 1024
    before = enrolled.read_bytes()
    if sector_size is None:
        document = json.loads(works("--direct", "scrub", enrolled, "--json"))
    else:
        with loop_device(enrolled, sector_size) as node:
            document = json.loads(works("--direct", "scrub", node, "--json"))
    assert document["bytes"] == len(space - taken) * BLOCK
    assert changed(before, enrolled.read_bytes()) == space - taken
    assert cryptsetup_opens(enrolled, KEY)
    assert cryptsetup_opens(enrolled, BACKUP)
    assert works("--direct", "reconcile", enrolled) == f"{enrolled}: clean\n"


def test_what_another_tool_has_leaked_is_gone(tmp_path):
    """The area of a keyslot that was removed from the header alone."""
    image = make_image(tmp_path / "image", extra_keys={1: b"leaked"})
    area = luks_dump_json(image)["keyslots"]["1"]["area"]
    start, size = int(area["offset"]), int(area["size"])
    with image.open("rb") as file:
        file.seek(start)
        leaked = file.read(size)
    before = make_image(tmp_path / "before")
    with before.open("r+b") as file:
        file.seek(start)
        file.write(leaked)
    works("--direct", "scrub", before)
    after = before.read_bytes()
    assert not any(leaked[at : at + 512] in after for at in range(0, size, 65536))
