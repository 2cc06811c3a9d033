# SPDX-License-Identifier: GPL-2.0-or-later
"""suspects: keyslots that other tools have left, on real images."""

import json

import pytest

from tests.ctl.conftest import ctl, fails, loop_device, works
from tests.support.makeimage import KEY, add_key, cryptsetup_opens, luks_dump_json, make_image

STRAY = b"stray"


@pytest.fixture
def strayed(tmp_path):
    """Keyslot 1 has come after the first reconcile."""
    image = make_image(tmp_path / "image")
    works("--direct", "reconcile", image)
    add_key(image, KEY, STRAY)
    return image


def suspects(image):
    return json.loads(works("--direct", "suspects", image, "--json"))["suspects"]


def test_they_are_listed_with_their_age(strayed):
    before = strayed.read_bytes()
    [found] = suspects(strayed)
    assert (found["keyslot"], found["claimed"]) == (1, None)
    assert 0 <= found["age_seconds"] < 3600
    assert found["first_seen"].endswith("Z")
    assert "KEYSLOT" in works("--direct", "suspects", strayed)
    assert strayed.read_bytes() == before


def test_a_volume_that_was_never_looked_at_has_none(tmp_path):
    image = make_image(tmp_path / "image")
    assert works("--direct", "suspects", image) == f"{image}: no suspects\n"


def test_accepting(strayed):
    works("--direct", "suspects", strayed, "--accept", "1")
    assert suspects(strayed) == []
    assert works("--direct", "reconcile", strayed) == f"{strayed}: clean\n"
    assert cryptsetup_opens(strayed, STRAY)


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_removing(strayed, sector_size):
    area = luks_dump_json(strayed)["keyslots"]["1"]["area"]
    start, end = int(area["offset"]), int(area["offset"]) + int(area["size"])
    before = strayed.read_bytes()
    with loop_device(strayed, sector_size) as node:
        done = works("--direct", "suspects", node, "--remove", "1", "--key-file", "-", stdin=KEY)
    assert done == f"removed keyslot 1 of {node}\n"
    assert not cryptsetup_opens(strayed, STRAY)
    assert cryptsetup_opens(strayed, KEY)
    after = strayed.read_bytes()
    assert all(before[at : at + 4096] != after[at : at + 4096] for at in range(start, end, 4096))
    assert before[end:] == after[end:]
    assert luks_dump_json(strayed)["tokens"] == {}
    assert suspects(strayed) == []


def test_I5_its_own_key_does_not_remove_it(strayed):
    before = strayed.read_bytes()
    assert fails(1, "--direct", "suspects", strayed, "--remove", "1", "-d", "-", stdin=STRAY)["error"] == "LastKeyslot"
    wrong = fails(1, "--direct", "suspects", strayed, "--remove", "1", "-d", "-", stdin=b"nothing")
    assert wrong["error"] == "WrongCredential"
    assert strayed.read_bytes() == before


def test_I5_the_last_way_in_stays(tmp_path):
    image = make_image(tmp_path / "image")
    assert fails(1, "--direct", "suspects", image, "--remove", "0", "-d", "-", stdin=KEY)["error"] == "LastKeyslot"


def test_a_managed_key_is_none_of_them(enrolled):
    for option in (("--accept", "1"), ("--remove", "1", "-d", "-")):
        assert fails(2, "--direct", "suspects", enrolled, *option, stdin=KEY)["error"] == "InvalidArgs"


def test_options_that_do_not_go_together(strayed):
    fails(2, "--direct", "suspects", strayed, "--key-file", "x")
    fails(2, "--direct", "suspects", strayed, "--accept", "1", "--remove", "1")


def test_it_needs_a_place_for_inventories(strayed, tmp_path):
    (tmp_path / "file").touch()
    done = ctl("--direct", "--json", "suspects", strayed, env={"STATE_DIRECTORY": str(tmp_path / "file")})
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] == "StateFailed"
