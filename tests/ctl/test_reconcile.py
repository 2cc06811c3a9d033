# SPDX-License-Identifier: GPL-2.0-or-later
"""reconcile: what is found, what is said, what is done."""

import json

import pytest

from tests.ctl.conftest import BACKUP, ctl, fails, loop_device, our_tokens, works
from tests.support.makeimage import KEY, cryptsetup_opens, import_token, make_image, run

RETIRED = 1 << 20
SIZE = 256 * 1024


@pytest.fixture
def pending(enrolled):
    """A volume with a wipe intent, and something to be wiped."""
    [token] = our_tokens(enrolled)
    token["wipe"] = [{"offset": str(RETIRED), "size": str(SIZE)}]
    run("token", "remove", "--token-id", "0", str(enrolled))
    import_token(enrolled, token, 0)
    with enrolled.open("r+b") as file:
        file.seek(RETIRED)
        file.write(b"retired!" * (SIZE // 8))
    return enrolled


def test_clean(enrolled):
    assert works("--direct", "reconcile", enrolled) == f"{enrolled}: clean\n"
    document = json.loads(works("--direct", "reconcile", enrolled, "--json"))
    volumes = [{"device": str(enrolled), "found": [], "repaired": [], "left": []}]
    assert document == {"dry_run": False, "volumes": volumes}


def test_dry_run_changes_nothing_and_says_what_would_be_done(pending):
    before = pending.read_bytes()
    text = works("--direct", "reconcile", "--dry-run", pending)
    assert f"{SIZE} bytes at {RETIRED}" in text
    assert "(token 0)" in text
    assert "would overwrite" in text
    [volume] = json.loads(works("--direct", "reconcile", "--dry-run", pending, "--json"))["volumes"]
    assert volume["found"] == volume["left"]
    assert [finding["code"] for finding in volume["found"]] == ["wipe-pending"]
    assert volume["repaired"] == []
    assert pending.read_bytes() == before


def test_finishes_a_wipe(pending):
    assert "wipe-pending" in json.dumps(json.loads(works("--direct", "show", pending, "--json"))["problems"])
    assert "repaired: " in works("--direct", "reconcile", pending)
    assert "wipe" not in our_tokens(pending)[0]
    assert b"retired!" not in pending.read_bytes()
    assert cryptsetup_opens(pending, BACKUP)
    assert cryptsetup_opens(pending, KEY)
    assert works("--direct", "reconcile", pending).endswith(": clean\n")


def test_a_rotation_finishes_it_too(pending):
    done = ctl("--direct", "rotate", pending, "-d", "-", "--generate", stdin=KEY)
    assert done.returncode == 0, done.stderr
    assert b"retired!" not in pending.read_bytes()


@pytest.mark.parametrize("offset", [448, 16384 + 448])
def test_heals_a_header_copy(enrolled, offset):
    whole = enrolled.read_bytes()
    with enrolled.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(32))
    assert "would write this copy again" in works("--direct", "reconcile", "--dry-run", enrolled)
    works("--direct", "reconcile", enrolled)
    assert works("--direct", "reconcile", enrolled).endswith(": clean\n")
    assert cryptsetup_opens(enrolled, BACKUP)
    assert enrolled.read_bytes()[32768:] == whole[32768:]


def test_a_foreign_signature_stops_libcryptsetup_but_not_us(enrolled):
    """Intel's RAID metadata in the last KiB: with a torn copy, no tool of libcryptsetup opens the volume any more."""
    with enrolled.open("r+b") as file:
        file.seek(-1024, 2)
        file.write(b"Intel Raid ISM Cfg Sig. 1.1.00".ljust(512, b"\0"))
    before = enrolled.read_bytes()
    keys = ("--key-file", "-", "--generate")
    assert (
        fails(1, "--direct", "rotate", enrolled, *keys, "--output", "/dev/null/x", stdin=KEY)["outcome"] == "unchanged"
    )
    refused = ctl("--direct", "rotate", enrolled, *keys, stdin=KEY)
    assert refused.returncode == 1
    assert b"isw_raid_member" in refused.stderr
    assert refused.stdout == b""
    assert enrolled.read_bytes() == before
    with enrolled.open("r+b") as file:
        file.seek(448)
        file.write(bytes(32))
    with pytest.raises(AssertionError, match="ambiguous signatures"):
        cryptsetup_opens(enrolled, KEY)
    done = ctl("--direct", "reconcile", enrolled)
    assert done.returncode == 3, "the signature is left to a person"
    assert b"repaired: " in done.stdout
    assert cryptsetup_opens(enrolled, KEY)
    assert cryptsetup_opens(enrolled, BACKUP)


def test_removes_a_token_whose_keyslot_is_gone(enrolled):
    run("luksKillSlot", "--key-file", "-", str(enrolled), "1", stdin=KEY)
    works("--direct", "reconcile", enrolled)
    assert our_tokens(enrolled) == []


def test_a_person_must_decide(enrolled):
    run("luksKillSlot", "--key-file", "-", str(enrolled), "1", stdin=KEY)
    import_token(enrolled, {"type": "luksrotd", "keyslots": ["0"], "name": "backup"}, 3)
    done = ctl("--direct", "reconcile", enrolled)
    assert done.returncode == 3
    assert b"needs a person: " in done.stdout
    assert b"repaired: " in done.stdout


def test_goes_on_after_a_device_that_fails(enrolled, tmp_path, pending):
    other = make_image(tmp_path / "other")
    done = ctl("--direct", "reconcile", tmp_path / "missing", pending, other, "--json")
    assert done.returncode == 1
    missing, mended, clean = json.loads(done.stdout)["volumes"]
    assert missing["error"] == "UnknownDevice"
    assert [finding["code"] for finding in mended["repaired"]] == ["wipe-pending"]
    assert clean["found"] == []


def test_one_device_that_fails(tmp_path):
    assert fails(1, "--direct", "reconcile", tmp_path / "missing")["error"] == "UnknownDevice"


def test_all_in_a_dry_run(pending):
    with loop_device(pending) as node:
        done = ctl("--direct", "reconcile", "--all", "--dry-run", "--json")
        [volume] = [volume for volume in json.loads(done.stdout)["volumes"] if volume["device"] == node]
    assert [finding["code"] for finding in volume["found"]] == ["wipe-pending"]
