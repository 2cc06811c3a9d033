# SPDX-License-Identifier: GPL-2.0-or-later
"""reconcile: what is found, what is said, what is done."""

import json

import pytest

from tests.ctl.conftest import BACKUP, ctl, fails, loop_device, our_tokens, works
from tests.support.makeimage import (
    KEY,
    PBKDF,
    add_key,
    cryptsetup_opens,
    import_token,
    luks_dump_json,
    make_image,
    run,
)

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
    volumes = [{"device": str(enrolled), "found": [], "repaired": [], "left": [], "differences": []}]
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


def test_volumes_in_order_cost_one_process_and_one_read_each_and_no_lock(tmp_path):
    images = [make_image(tmp_path / f"{number}.img") for number in range(8)]
    works("--direct", "reconcile", *images)
    (tmp_path / "trace").mkdir()
    options = ("-ff", "-yy", "-e", "trace=execve,flock,preadv,preadv2", "-o", str(tmp_path / "trace/of"))
    said = works("--direct", "reconcile", *images, prefix=("strace", *options))
    assert said.splitlines() == [f"{image}: clean" for image in images]
    lines = [line for file in (tmp_path / "trace").iterdir() for line in file.read_text().splitlines()]
    assert len([line for line in lines if '"wipefs"' in line and line.endswith("= 0")]) == 1
    assert not [line for line in lines if line.startswith("flock(")]
    for image in images:
        reads = [line for line in lines if line.startswith("preadv") and str(image) in line]
        assert len(reads) == 1
        assert reads[0].endswith("= 32768")


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


def test_a_device_that_is_named_twice(pending):
    done = ctl("--direct", "reconcile", pending, pending, "--json")
    assert done.returncode == 0
    volumes = json.loads(done.stdout)["volumes"]
    assert [volume["device"] for volume in volumes] == [str(pending)] * 2
    assert "wipe-pending" in {finding["code"] for volume in volumes for finding in volume["repaired"]}


def test_one_device_that_fails(tmp_path):
    assert fails(1, "--direct", "reconcile", tmp_path / "missing")["error"] == "UnknownDevice"


def test_all_in_a_dry_run(pending):
    with loop_device(pending) as node:
        done = ctl("--direct", "reconcile", "--all", "--dry-run", "--json")
        [volume] = [volume for volume in json.loads(done.stdout)["volumes"] if volume["device"] == node]
    assert [finding["code"] for finding in volume["found"]] == ["wipe-pending"]


ONE, TWO = b"generation one", b"generation two"
PAIR = {"type": "luksrotd", "version": 1, "name": "backup", "state": "active", "rotated_at": "2026-01-01T00:00:00Z"}


def pairs(path, *members):
    """KEY opens keyslot 0, ONE and TWO the next; a token of ours on each of those, as other tools can write it."""
    image = make_image(path, extra_keys={1: ONE, 2: TWO})
    for number, more in enumerate(members):
        token = {**PAIR, "keyslots": [str(number + 1)], "generation": number + 1, "data": {}, **more}
        import_token(image, token, number)
    return image


def area_of(image, keyslot):
    area = luks_dump_json(image)["keyslots"][str(keyslot)]["area"]
    return int(area["offset"]), int(area["size"])


#: What a crash leaves of a rotation in steps, as cryptsetup's own tools can build it.
CUT = {
    "two pairs": (({}, {}), {"key-superseded"}),
    "two pairs, the newer not settled": (({}, {"retires": ["0"]}), {"key-superseded", "key-unsettled"}),
    "a retired pair": (({"state": "retired"}, {}), {"key-retired"}),
}


@pytest.mark.parametrize("name", CUT)
def test_finishes_a_rotation_in_steps(name, tmp_path):
    members, expected = CUT[name]
    image = pairs(tmp_path / "image", *members)
    offset, size = area_of(image, 1)
    before = image.read_bytes()
    text = works("--direct", "reconcile", "--dry-run", image)
    assert f"{image}: difference: keyslot 1 removed" in text
    assert f"{image}: difference: {size} bytes at {offset} overwritten" in text
    assert image.read_bytes() == before
    [told] = json.loads(works("--direct", "reconcile", "--dry-run", image, "--json"))["volumes"]
    [done] = json.loads(works("--direct", "reconcile", image, "--json"))["volumes"]
    assert {finding["code"] for finding in done["repaired"]} == expected
    assert done["left"] == []
    assert done["differences"] == told["differences"]
    assert not cryptsetup_opens(image, ONE)
    assert cryptsetup_opens(image, TWO, 2)
    assert cryptsetup_opens(image, KEY, 0)
    assert before[offset : offset + size] != image.read_bytes()[offset : offset + size]
    [token] = our_tokens(image)
    assert token["generation"] == 2
    assert "retires" not in token
    assert works("--direct", "reconcile", image).endswith(": clean\n")


def test_a_rotation_finishes_a_rotation_in_steps(tmp_path):
    image = pairs(tmp_path / "image", {}, {"retires": ["0"]})
    done = ctl("--direct", "rotate", image, "-d", "-", "--generate", stdin=TWO)
    assert done.returncode == 0, done.stderr
    assert not cryptsetup_opens(image, ONE)
    assert [token["generation"] for token in our_tokens(image)] == [3]


def test_a_token_that_was_not_born_goes(tmp_path):
    image = pairs(tmp_path / "image", {}, {"keyslots": [], "retires": ["0"]})
    [done] = json.loads(works("--direct", "reconcile", image, "--json"))["volumes"]
    assert [finding["code"] for finding in done["repaired"]] == ["key-unborn"]
    assert [token["generation"] for token in our_tokens(image)] == [1]


def test_a_wipe_record_is_worked_off(tmp_path):
    image = make_image(tmp_path / "image")
    record = {"type": "luksrotd-wipe", "keyslots": [], "version": 1}
    import_token(image, record | {"wipe": [{"offset": str(RETIRED), "size": str(SIZE)}]}, 5)
    with image.open("r+b") as file:
        file.seek(RETIRED)
        file.write(b"retired!" * (SIZE // 8))
    works("--direct", "reconcile", image)
    assert b"retired!" not in image.read_bytes()
    assert luks_dump_json(image)["tokens"] == {}


def test_a_forgotten_staged_key_is_aborted_only_if_that_is_asked_for(tmp_path):
    image = pairs(tmp_path / "image", {}, {"state": "staged", "expires_at": "2026-01-02T00:00:00Z"})
    done = ctl("--direct", "reconcile", image)
    assert done.returncode == 3
    assert b"needs a person: " in done.stdout
    assert cryptsetup_opens(image, TWO)
    works("--direct", "reconcile", image, "--retire-expired")
    assert not cryptsetup_opens(image, TWO)
    assert cryptsetup_opens(image, ONE)


def test_a_luks1_volume_is_left_alone(tmp_path):
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(4 * 1024 * 1024)
    options = ("--type", "luks1", "--pbkdf-force-iterations", "1000", "--key-file", "-")
    run("luksFormat", *options, str(image), stdin=KEY)
    before = image.read_bytes()
    assert "LUKS1" in fails(1, "--direct", "reconcile", image)["message"]
    assert image.read_bytes() == before


def test_a_re_encryption_is_left_alone_and_it_says_why(tmp_path):
    image = make_image(tmp_path / "image")
    record = {"type": "luksrotd-wipe", "keyslots": [], "version": 1}
    import_token(image, record | {"wipe": [{"offset": str(RETIRED), "size": str(SIZE)}]}, 5)
    run("reencrypt", "--init-only", "--key-file", "-", *PBKDF, str(image), stdin=KEY)
    before = image.read_bytes()
    done = ctl("--direct", "reconcile", image)
    assert done.returncode == 3
    assert b"a re-encryption has not been finished" in done.stdout
    assert b"would" not in done.stdout
    assert image.read_bytes() == before


def test_a_note_is_no_failure(tmp_path):
    image = make_image(tmp_path / "image")
    works("--direct", "reconcile", image)
    add_key(image, KEY, b"stray")
    assert ": note: keyslot 1 has no token" in works("--direct", "reconcile", image)
    assert ": note: keyslot 1 has no token" in works("--direct", "reconcile", "--dry-run", image)


def test_a_state_directory_that_cannot_be_is_a_note(tmp_path):
    image = make_image(tmp_path / "image")
    (tmp_path / "file").touch()
    text = works("--direct", "reconcile", image, env={"STATE_DIRECTORY": str(tmp_path / "file")})
    assert ": note: cannot read the inventory" in text
