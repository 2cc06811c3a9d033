# SPDX-License-Identifier: GPL-2.0-or-later
"""The other verbs that work with --direct only: remove, set-data, adopt, release, recreate, scrub."""

import json
import os

import pytest

from tests.ctl.conftest import BACKUP, CHEAP, NEXT, ctl, fails, our_tokens, works
from tests.support.makeimage import (
    KEY,
    add_key,
    cryptsetup_opens,
    import_token,
    luks_dump_json,
    make_image,
    run,
)

RECOVERY = {"type": "systemd-recovery", "keyslots": ["1"], "note": "keep"}


def volume_key(image, path):
    key = path / "volume.key"
    run("luksDump", "--dump-volume-key", "--volume-key-file", str(key), "--key-file", "-", str(image), stdin=KEY)
    return key


def test_remove(enrolled, secret):
    area = luks_dump_json(enrolled)["keyslots"]["1"]["area"]
    offset, size = int(area["offset"]), int(area["size"])
    before = enrolled.read_bytes()[offset : offset + size]
    assert "removed key backup" in works("--direct", "remove", enrolled, "-d", secret(KEY))
    assert our_tokens(enrolled) == []
    assert set(luks_dump_json(enrolled)["keyslots"]) == {"0"}
    assert cryptsetup_opens(enrolled, KEY)
    assert not cryptsetup_opens(enrolled, BACKUP)
    after = enrolled.read_bytes()[offset : offset + size]
    assert sum(a == b for a, b in zip(before, after, strict=True)) < size // 64
    assert fails(1, "--direct", "remove", enrolled, "-d", secret(KEY))["error"] == "UnknownKey"


def test_remove_wants_to_see_another_key(enrolled, secret):
    before = enrolled.read_bytes()
    assert fails(1, "--direct", "remove", enrolled, "-d", secret(BACKUP))["error"] == "LastKeyslot"
    assert fails(1, "--direct", "remove", enrolled, "-d", secret(b"wrong"))["error"] == "WrongCredential"
    assert enrolled.read_bytes() == before


def test_set_data(enrolled, tmp_path):
    document = json.loads(works("--direct", "--json", "set-data", enrolled, "--data", '{"at": [2]}'))
    assert (document["name"], document["generation"], document["keyslot"]) == ("backup", 1, 1)
    [token] = our_tokens(enrolled)
    assert (token["data"], token["generation"]) == ({"at": [2]}, 1)
    assert cryptsetup_opens(enrolled, BACKUP, 1)
    (tmp_path / "data.json").write_text("{}")
    works("--direct", "set-data", enrolled, "--data", f"@{tmp_path / 'data.json'}")
    assert our_tokens(enrolled)[0]["data"] == {}
    before = enrolled.read_bytes()
    assert fails(2, "--direct", "set-data", enrolled, "--data", "[]")["error"] == "InvalidArgs"
    assert fails(2, "--direct", "set-data", enrolled)["error"] == "InvalidArgs"
    assert fails(1, "--direct", "set-data", enrolled, "--data", "{}", "--name", "no")["error"] == "UnknownKey"
    assert enrolled.read_bytes() == before


@pytest.fixture
def recovery(tmp_path):
    """A volume with a recovery key in keyslot 1, as systemd-cryptenroll makes it."""
    image = make_image(tmp_path / "image", extra_keys={1: BACKUP})
    import_token(image, RECOVERY, 0)
    return image


def test_adopt_then_release_leaves_it_as_it_was(recovery, secret):
    before = luks_dump_json(recovery)
    arguments = ("--keyslot", 1, "-d", secret(BACKUP), "--data", '{"at": 1}')
    assert works("--direct", "adopt", recovery, *arguments) == f"adopted keyslot 1 of {recovery} as key backup\n"
    [token] = our_tokens(recovery)
    assert (token["keyslots"], token["generation"], token["data"]) == (["1"], 1, {"at": 1})
    assert cryptsetup_opens(recovery, BACKUP, 1)
    assert "this is key backup" in works("--direct", "verify", recovery, "-d", secret(BACKUP))
    assert "released key backup" in works("--direct", "release", recovery)
    assert luks_dump_json(recovery) == before
    assert fails(1, "--direct", "release", recovery)["error"] == "UnknownKey"


def test_an_adopted_key_is_rotated_like_any_other(recovery, secret):
    works("--direct", "adopt", recovery, "--keyslot", 1)
    works("--direct", "rotate", recovery, "-d", secret(BACKUP), "--new-keyfile", secret(NEXT), *CHEAP)
    works("--direct", "release", recovery)
    [token] = luks_dump_json(recovery)["tokens"].values()
    assert (token["type"], token["note"]) == ("systemd-recovery", "keep")
    assert cryptsetup_opens(recovery, NEXT, int(token["keyslots"][0]))
    assert not cryptsetup_opens(recovery, BACKUP)


def test_adopt_tries_the_key_before_it_writes(recovery, secret):
    before = recovery.read_bytes()
    for key in (KEY, b"wrong"):
        refused = fails(1, "--direct", "adopt", recovery, "--keyslot", 1, "-d", secret(key))
        assert refused["error"] == "WrongCredential"
    assert fails(2, "--direct", "adopt", recovery, "--keyslot", 7)["error"] == "InvalidArgs"
    assert fails(1, "--direct", "adopt", "/none", "--keyslot", 1)["error"] == "UnknownDevice"
    assert recovery.read_bytes() == before


def test_recreate_the_token_from_the_key(enrolled, secret):
    works("--direct", "set-data", enrolled, "--data", '{"at": 1}')
    run("token", "remove", "--token-id", "0", str(enrolled))
    before = enrolled.read_bytes()
    assert "its associated data is lost" in fails(2, "--direct", "recreate", enrolled, "-d", secret(BACKUP))["message"]
    assert fails(1, "--direct", "recreate", enrolled, "-d", secret(b"wrong"))["error"] == "WrongCredential"
    assert enrolled.read_bytes() == before
    works("--direct", "recreate", enrolled, "-d", secret(BACKUP), "--data", '{"at": 2}')
    [token] = our_tokens(enrolled)
    assert (token["keyslots"], token["data"]) == (["1"], {"at": 2})
    assert set(luks_dump_json(enrolled)["keyslots"]) == {"0", "1"}
    assert "this is key backup" in works("--direct", "verify", enrolled, "-d", secret(BACKUP))


def test_recreate_what_another_tool_has_changed(enrolled, secret):
    """luksChangeKey leaves a token that speaks of another key; its data is taken over."""
    works("--direct", "set-data", enrolled, "--data", '{"at": 1}')
    key_file, new_file = secret(BACKUP), secret(NEXT)
    cost = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    run("luksChangeKey", "--key-file", str(key_file), *cost, str(enrolled), str(new_file))
    assert "changed" in works("--direct", "show", enrolled)
    works("--direct", "recreate", enrolled, "-d", new_file)
    [token] = our_tokens(enrolled)
    assert (token["generation"], token["data"]) == (2, {"at": 1})
    assert "this is key backup" in works("--direct", "verify", enrolled, "-d", new_file)


@pytest.mark.parametrize("way", ["key", "volume-key"])
def test_recreate_the_pair(enrolled, secret, tmp_path, way):
    credential = ("-d", secret(KEY)) if way == "key" else ("--volume-key-file", volume_key(enrolled, tmp_path))
    run("luksKillSlot", "--key-file", str(secret(KEY)), str(enrolled), "1")
    output = tmp_path / "new.key"
    document = json.loads(
        works("--direct", "--json", "recreate", enrolled, *credential, "--generate", "--output", output)
    )
    assert (document["generation"], document["output"]) == (2, str(output))
    [token] = our_tokens(enrolled)
    assert cryptsetup_opens(enrolled, output.read_bytes(), int(token["keyslots"][0]))
    assert cryptsetup_opens(enrolled, KEY)
    assert fails(1, "--direct", "recreate", enrolled, "-d", secret(KEY), "--new-keyfile", secret(NEXT))["error"] == (
        "KeyExists"
    )


def test_a_wrong_volume_key(enrolled, secret, tmp_path):
    run("luksKillSlot", "--key-file", str(secret(KEY)), str(enrolled), "1")
    before = enrolled.read_bytes()
    wrong = tmp_path / "wrong.key"
    wrong.write_bytes(bytes(64))
    arguments = ("--volume-key-file", wrong, "--new-keyfile", secret(NEXT), *CHEAP)
    assert fails(1, "--direct", "recreate", enrolled, *arguments)["error"] == "WrongCredential"
    assert enrolled.read_bytes() == before


@pytest.mark.parametrize(
    "options",
    [
        ("--volume-key-file", "x"),
        ("--volume-key-file", "x", "-d", "y", "--generate"),
        ("--volume-key-file", "-", "--new-keyfile", "-"),
        ("--pbkdf", "pbkdf2", "-d", "x"),
        ("--output", "x", "-d", "x"),
    ],
)
def test_recreate_wrong_usage(options):
    assert fails(2, "--direct", "recreate", "/none", *options)["error"] == "InvalidArgs"


def test_scrub_overwrites_what_other_tools_leave(image, secret):
    add_key(image, KEY, BACKUP)
    metadata = luks_dump_json(image)
    area = metadata["keyslots"]["1"]["area"]
    offset, size = int(area["offset"]), int(area["size"])
    leaked = image.read_bytes()[offset : offset + size]
    run("luksKillSlot", "--key-file", str(secret(KEY)), str(image), "1")
    with image.open("r+b") as file:  # as a power cut leaves it, before it was wiped
        os.pwrite(file.fileno(), leaked, offset)
    before = luks_dump_json(image)
    document = json.loads(works("--direct", "--json", "scrub", image))
    used = int(before["keyslots"]["0"]["area"]["size"])
    assert document == {"device": str(image), "bytes": int(before["config"]["keyslots_size"]) - used}
    now = image.read_bytes()[offset : offset + size]
    assert not any(leaked[at : at + 512] == now[at : at + 512] for at in range(0, size, 512))
    assert luks_dump_json(image) == before
    assert cryptsetup_opens(image, KEY)
    assert fails(1, "--direct", "scrub", "/none")["error"] == "UnknownDevice"


@pytest.mark.parametrize(
    "arguments",
    [
        ("stage", "--new-keyfile"),
        ("recreate", "--new-keyfile"),
        ("remove",),
    ],
)
def test_a_key_that_is_asked_for_needs_a_terminal(enrolled, arguments, secret):
    verb, *rest = arguments
    options = (*rest, secret(NEXT)) if rest else ()
    done = ctl("--direct", verb, enrolled, *options, start_new_session=True)
    assert done.returncode == 2
    assert b"--key-file" in done.stderr
