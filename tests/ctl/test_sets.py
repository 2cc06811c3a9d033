# SPDX-License-Identifier: GPL-2.0-or-later
"""The same key on a set of volumes, judged by the stock tools; tests/service/test_sets.py has all that can fail."""

import json
import shutil

import pytest

from tests.ctl.conftest import BACKUP, CHEAP, NEXT, ctl, fails, our_tokens, works
from tests.ctl.terminal import terminal
from tests.ctl.test_keys import GENERATED
from tests.support import forge
from tests.support.makeimage import KEY, cryptsetup_opens, run

HEADERS = 32768
"""Bytes of both header copies."""


@pytest.fixture
def volumes(enrolled, tmp_path):
    """Three of them; they share a UUID, as clones of an image do."""
    return [enrolled, *(shutil.copy(enrolled, tmp_path / f"image{number}") for number in (2, 3))]


def new(secret, key=NEXT):
    return "-d", secret(KEY), "--new-keyfile", secret(key), *CHEAP


def opened(volumes, *keys):
    return [[cryptsetup_opens(volume, key) for key in keys] for volume in volumes]


def test_staged_on_all_then_finished_on_all(volumes, secret):
    document = json.loads(works("--direct", "--json", "stage", *volumes, *new(secret)))
    assert (document["name"], document["set_size"], document["state"]) == ("backup", 3, "staged")
    assert [(one["device"], one["happened"], one["generation"], one["keyslot"]) for one in document["volumes"]] == [
        (str(volume), "staged", 2, 2) for volume in volumes
    ]
    assert opened(volumes, KEY, BACKUP, NEXT) == [[True] * 3] * 3
    for volume in volumes:
        [token] = [token for token in our_tokens(volume) if token["state"] == "staged"]
        assert token["group"] == {"id": document["set"], "size": 3}
    assert f"set {document['set']} of 3" in works("--direct", "show", volumes[0])
    text = works("--direct", "finish", *volumes)
    assert "finished on all of them" in text
    assert opened(volumes, KEY, BACKUP, NEXT) == [[True, False, True]] * 3
    again = json.loads(works("--direct", "--json", "finish", *volumes))
    assert [one["happened"] for one in again["volumes"]] == ["already"] * 3


def test_aborted_on_all(volumes, secret):
    works("--direct", "stage", *volumes, *new(secret))
    assert "nothing is staged on them" in works("--direct", "abort", *volumes)
    assert opened(volumes, KEY, BACKUP, NEXT) == [[True, True, False]] * 3
    assert fails(2, "--direct", "abort", *volumes)["error"] == "InvalidArgs"


def test_one_generated_key_for_all(volumes, secret, tmp_path):
    output = tmp_path / "next.key"
    arguments = ("-d", secret(KEY), "--generate", "--output", output)
    document = json.loads(works("--direct", "--json", "stage", *volumes, *arguments))
    assert document["output"] == str(output)
    assert GENERATED.fullmatch(output.read_bytes())
    assert opened(volumes, output.read_bytes()) == [[True]] * 3
    works("--direct", "abort", *volumes)
    done = ctl("--direct", "stage", *volumes, "-d", secret(KEY), "--generate")
    assert (done.returncode, opened(volumes, done.stdout)) == (0, [[True]] * 3)
    assert b"staged on all of them" in done.stderr


def test_keys_from_pipes_are_read_once_for_all(volumes, secret):
    arguments = ("-d", "-", "--new-keyfile", secret(NEXT), *CHEAP)
    works("--direct", "stage", *volumes, *arguments, stdin=KEY)
    assert opened(volumes, NEXT) == [[True]] * 3


def test_undone_where_it_fails_on_one(volumes, secret, tmp_path):
    run("luksKillSlot", "--batch-mode", str(volumes[1]), "0")  # KEY does not open it any more
    output = tmp_path / "next.key"
    done = ctl("--direct", "--json", "stage", *volumes, "-d", secret(KEY), "--generate", "--output", output)
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert [one["happened"] for one in document["volumes"]] == ["undone", "failed", "nothing"]
    assert document["volumes"][1]["error"] == "WrongCredential"
    assert (document["state"], "output" in document, output.exists()) == ("unstaged", False, False)
    assert opened(volumes, BACKUP) == [[True]] * 3
    assert all(len(our_tokens(volume)) == 1 for volume in volumes)


def test_kept_and_taken_up_again(volumes, secret, tmp_path):
    whole = volumes[1].read_bytes()
    run("luksKillSlot", "--batch-mode", str(volumes[1]), "0")
    output = tmp_path / "next.key"
    done = ctl("--direct", "stage", *volumes, "-d", secret(KEY), "--generate", "--output", output, "--keep")
    assert done.returncode == 1
    assert b"stage again with the same key" in done.stdout
    assert opened(volumes[:1], output.read_bytes()) == [[True]]
    volumes[1].write_bytes(whole)
    refused = fails(1, "--direct", "stage", *volumes, *new(secret))
    assert (refused["error"], str(volumes[0]) in refused["message"]) == ("WrongCredential", True)
    assert fails(3, "--direct", "finish", *volumes)["error"] == "NeedsPerson"
    status = json.loads(works("--direct", "--json", "status", *volumes))
    assert (status["state"], status["steps"]) == ("partly-staged", ["abort", "stage"])
    assert [one["standing"] for one in status["volumes"]] == ["staged", "old", "old"]
    works("--direct", "stage", *volumes, *new(secret, output.read_bytes()))
    works("--direct", "finish", *volumes)
    assert opened(volumes, output.read_bytes(), BACKUP) == [[True, False]] * 3


def test_a_part_of_a_set_only_if_it_is_meant(volumes, secret):
    works("--direct", "stage", *volumes, *new(secret))
    for verb in ("finish", "abort"):
        assert "name all of them" in fails(3, "--direct", verb, volumes[0])["message"]
        assert "3 volumes belong to set" in fails(3, "--direct", verb, *volumes[:2])["message"]
    assert ctl("--direct", "status", *volumes[:2]).returncode == 3
    works("--direct", "finish", volumes[0], "--alone")
    assert opened(volumes, BACKUP) == [[False], [True], [True]]
    assert "finished on some volumes already" in fails(3, "--direct", "abort", *volumes)["message"]
    assert "finish the others" in works("--direct", "status", *volumes)
    works("--direct", "abort", volumes[2], "--alone")
    assert opened(volumes, NEXT) == [[True], [True], [False]]
    assert "nothing is staged" in fails(3, "--direct", "stage", *volumes, *new(secret))["message"]


def test_by_its_id(volumes, secret):
    works("--direct", "stage", *volumes, *new(secret), "--set", "rack-4")
    assert our_tokens(volumes[0])[1]["group"] == {"id": "rack-4", "size": 3}
    assert "is staged for set rack-4" in fails(3, "--direct", "finish", *volumes, "--set", "rack-5")["message"]
    works("--direct", "finish", *volumes, "--set", "rack-4")
    works("--direct", "stage", volumes[0], *new(secret, b"third"), "--set", "alone")
    works("--direct", "finish", volumes[0])


@pytest.mark.parametrize(
    "arguments",
    [
        ("finish", "a", "b", "--alone"),
        ("abort", "a", "b", "--generation", "2"),
        ("finish", "a", "--alone", "--set", "x"),
        ("finish", "a", "b", "--header", "x"),
        ("finish",),
        ("stage", "a", "b", "--output", "x"),
    ],
)
def test_wrong_usage(arguments):
    assert fails(2, "--direct", *arguments)["error"] == "InvalidArgs"


def test_the_same_volume_twice(volumes, secret, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(volumes[0])
    assert "twice" in fails(2, "--direct", "stage", volumes[0], link, *new(secret))["message"]


def endless(image):
    """Trying a key on its first keyslot takes for ever."""
    content = image.read_bytes()
    head = forge.edited(content[:HEADERS], lambda raw: raw["keyslots"]["0"]["kdf"].update(iterations=2**32 - 1))
    image.write_bytes(head + content[HEADERS:])


@pytest.mark.parametrize("keep", [False, True])
def test_stopped_half_way(volumes, secret, tmp_path, keep):
    endless(volumes[1])
    before = volumes[1].read_bytes()
    output = tmp_path / "next.key"
    options = ("-d", secret(KEY), "--generate", "--output", output, *(["--keep"] if keep else []))
    with terminal("--direct", "stage", *volumes, *options) as shown:
        while len(our_tokens(volumes[0])) == 1:
            shown.wait()
        shown.type(b"\x03")
        shown.expect(b"staged" if keep else b"staged, and aborted again")
        shown.expect(b"interrupted")
        assert shown.end()[1] == 1
    assert volumes[1].read_bytes() == before
    assert output.exists() == keep
    assert opened(volumes[::2], BACKUP) == [[True]] * 2
    assert len(our_tokens(volumes[0])) == (2 if keep else 1)
