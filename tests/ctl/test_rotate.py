# SPDX-License-Identifier: GPL-2.0-or-later
"""The main job, judged by the stock tools."""

import json
import os

import pytest

from tests.ctl.conftest import BACKUP, CHEAP, NEXT, ctl, loop_device, our_tokens, works
from tests.support.makeimage import KEY, cryptsetup_opens, luks_dump_json, make_image, run


def test_enrolled_key_opens_and_is_named_by_its_token(image, secret):
    key, new = secret(KEY), secret(BACKUP)
    works("--direct", "enroll", image, "--key-file", key, "--new-keyfile", new, "--data", '{"at": [1, "é"]}', *CHEAP)
    [token] = our_tokens(image)
    [keyslot] = token["keyslots"]
    assert (token["name"], token["generation"], token["data"]) == ("backup", 1, {"at": [1, "é"]})
    assert cryptsetup_opens(image, BACKUP, int(keyslot))
    assert cryptsetup_opens(image, KEY, 0)


def test_the_command_line_of_the_contract(enrolled, secret):
    arguments = ["--key-file", str(secret(KEY)), "--new-keyfile", str(secret(NEXT)), "--data", '{"escrow": "vault/2"}']
    done = ctl("--direct", "rotate", enrolled, *arguments, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    assert (done.returncode, done.stderr) == (0, b"")
    assert cryptsetup_opens(enrolled, NEXT)
    assert not cryptsetup_opens(enrolled, BACKUP)
    assert cryptsetup_opens(enrolled, KEY)
    metadata = luks_dump_json(enrolled)
    exported = json.loads(run("token", "export", "--token-id", "0", str(enrolled)))
    assert exported == metadata["tokens"]["0"]
    assert exported | {"name": "backup", "generation": 2, "data": {"escrow": "vault/2"}} == exported
    assert "wipe" not in exported
    [keyslot] = exported["keyslots"]
    assert set(metadata["keyslots"]) == {"0", keyslot}
    kdf = metadata["keyslots"][keyslot]["kdf"]
    assert (kdf["type"], kdf["iterations"]) == ("pbkdf2", 1000)


def test_rotation_by_the_old_key_keeps_the_data_and_other_keys(enrolled, secret):
    data = ["--data", '{"keep": true}', "--name", "second"]
    works("--direct", "enroll", enrolled, "-d", secret(KEY), "--new-keyfile", secret(b"another"), *data, *CHEAP)
    works(
        "--direct", "rotate", enrolled, "-d", secret(b"another"), "--new-keyfile", secret(NEXT), "--name=second", *CHEAP
    )
    found = {token["name"]: token for token in our_tokens(enrolled)}
    assert (found["second"]["generation"], found["second"]["data"]) == (2, {"keep": True})
    assert found["backup"]["generation"] == 1
    assert cryptsetup_opens(enrolled, BACKUP)
    assert not cryptsetup_opens(enrolled, b"another")


def test_data_from_a_file(image, secret, tmp_path):
    (tmp_path / "data.json").write_text('{"from": "a file"}')
    data = f"@{tmp_path / 'data.json'}"
    works("--direct", "enroll", image, "-d", secret(KEY), "--new-keyfile", secret(NEXT), "--data", data, *CHEAP)
    assert our_tokens(image)[0]["data"] == {"from": "a file"}


def test_argon2_costs(image, secret):
    cost = ["--pbkdf=argon2id", "--pbkdf-memory=64", "--pbkdf-parallel=2", "--pbkdf-force-iterations=4"]
    works("--direct", "enroll", image, "-d", secret(KEY), "--new-keyfile", secret(NEXT), *cost)
    kdf = luks_dump_json(image)["keyslots"]["1"]["kdf"]
    assert (kdf["type"], kdf["memory"], kdf["cpus"], kdf["time"]) == ("argon2id", 64, 2, 4)


def test_detached_header(tmp_path, secret):
    header = make_image(tmp_path / "header", detached=True)
    data = tmp_path / "header.data"
    before = data.read_bytes()
    works("--direct", "enroll", data, "--header", header, "-d", secret(KEY), "--new-keyfile", secret(BACKUP), *CHEAP)
    works("--direct", "rotate", data, "--header", header, "-d", secret(BACKUP), "--new-keyfile", secret(NEXT), *CHEAP)
    assert our_tokens(header)[0]["generation"] == 2
    assert cryptsetup_opens(header, NEXT)
    assert not cryptsetup_opens(header, BACKUP)
    assert data.read_bytes() == before


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_block_device(image, secret, sector_size):
    with loop_device(image, sector_size) as node:
        uuid = luks_dump_json_uuid(node)
        works("--direct", "enroll", node, "-d", secret(KEY), "--new-keyfile", secret(BACKUP), *CHEAP)
        new = secret(NEXT)
        works("--direct", "rotate", f"UUID={uuid}", "-d", secret(BACKUP), "--new-keyfile", new, *CHEAP)
        assert cryptsetup_opens(node, NEXT)
        assert not cryptsetup_opens(node, BACKUP)
        works("--direct", "verify", uuid, "--key-file", new)
        listed = {volume["device"]: volume for volume in json.loads(works("--direct", "list", "--json"))["volumes"]}
        assert listed[node]["uuid"] == uuid
        assert [(key["name"], key["generation"]) for key in listed[node]["keys"]] == [("backup", 2)]
        assert f"{node} " in works("--direct", "list")


def luks_dump_json_uuid(device):
    return run("luksUUID", str(device)).strip()


def test_key_files_count_to_the_last_byte(image, secret):
    works("--direct", "enroll", image, "-d", secret(KEY), "--new-keyfile", secret(b"line\n"), *CHEAP)
    assert cryptsetup_opens(image, b"line\n")
    assert not cryptsetup_opens(image, b"line")


def test_keys_from_standard_input_and_pipes(image, secret):
    works("--direct", "enroll", image, "-d", "-", "--new-keyfile", secret(BACKUP), *CHEAP, stdin=KEY)
    reader, writer = os.pipe()
    os.write(writer, NEXT)
    os.close(writer)
    pipe = f"/dev/fd/{reader}"
    works("--direct", "rotate", image, "-d", secret(KEY), "--new-keyfile", pipe, *CHEAP, pass_fds=[reader])
    os.close(reader)
    assert cryptsetup_opens(image, NEXT)


def test_show_tells_what_is_there(enrolled):
    run("token", "import", "--token-id", "5", str(enrolled), stdin=b'{"type": "other", "keyslots": []}')
    shown = json.loads(works("--direct", "show", enrolled, "--json"))
    [key] = shown.pop("keys")
    rotated_at = key.pop("rotated_at")
    assert rotated_at.endswith("Z")
    assert key == {
        "token": 0, "name": "backup", "generation": 1, "state": "active", "keyslot": 1,
        "wipe_pending": False, "changed": False, "expires_at": "", "set": "", "set_size": 0, "data": {},
    }  # fmt: skip
    assert shown.pop("uuid") == luks_dump_json_uuid(enrolled)
    assert isinstance(shown.pop("seqid"), int)
    assert shown == {
        "device": str(enrolled), "label": "", "keyslots": [0, 1], "ordinary_keyslots": [0],
        "tokens": {"0": "luksrotd", "5": "other"}, "problems": [], "busy": None,
    }  # fmt: skip
    text = works("--direct", "show", enrolled)
    assert "ordinary keyslots: 0" in text
    assert "5 (other)" in text
    assert rotated_at in text


def test_a_hostile_label_does_not_reach_the_terminal(image):
    run("config", "--label", "\x1b]0;owned\x07[bold]", str(image))
    assert "label: \\x1b]0;owned\\x07[bold]" in works("--direct", "show", image)
