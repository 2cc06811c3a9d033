# SPDX-License-Identifier: GPL-2.0-or-later
"""Rotation in two steps, judged by the stock tools."""

import json
import re
import signal

import pytest

from tests.ctl.conftest import BACKUP, CHEAP, NEXT, ctl, fails, loop_device, our_tokens, works
from tests.ctl.terminal import terminal
from tests.ctl.test_keys import ENDLESS, GENERATED
from tests.support.makeimage import KEY, cryptsetup_opens, make_image


@pytest.fixture
def staged(enrolled, secret):
    stage(enrolled, secret)
    return enrolled


def stage(image, secret, *options, key=KEY, new=NEXT):
    arguments = ("-d", secret(key), "--new-keyfile", secret(new), *CHEAP, *options)
    return works("--direct", "stage", image, *arguments)


def generations(image):
    return {(token["generation"], token["state"]) for token in our_tokens(image)}


def test_both_keys_open_until_it_is_finished(enrolled, secret):
    text = stage(enrolled, secret, "--data", '{"at": 2}', key=BACKUP)
    assert text == (
        f"staged key backup of {enrolled}: generation 2 in keyslot 2, beside the current one; finish or abort it\n"
    )
    assert generations(enrolled) == {(1, "active"), (2, "staged")}
    assert all(cryptsetup_opens(enrolled, key) for key in (KEY, BACKUP, NEXT))
    shown = works("--direct", "show", enrolled)
    assert re.search(r"backup +2 +staged, until 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ +2 ", shown)
    works("--direct", "finish", enrolled)
    [token] = our_tokens(enrolled)
    assert (token["generation"], token["state"], token["data"]) == (2, "active", {"at": 2})
    assert "expires_at" not in token
    assert cryptsetup_opens(enrolled, NEXT, int(token["keyslots"][0]))
    assert cryptsetup_opens(enrolled, KEY)
    assert not cryptsetup_opens(enrolled, BACKUP)
    assert "clean" in works("--direct", "reconcile", enrolled)


def test_abort_takes_the_staged_key_back(staged):
    assert "generation 1 in keyslot 1 stays" in works("--direct", "abort", staged)
    assert generations(staged) == {(1, "active")}
    assert cryptsetup_opens(staged, BACKUP)
    assert not cryptsetup_opens(staged, NEXT)
    assert fails(2, "--direct", "abort", staged)["error"] == "InvalidArgs"
    assert fails(2, "--direct", "finish", staged)["error"] == "InvalidArgs"


def test_confirm_is_finish_and_takes_the_generation_that_was_meant(staged):
    before = staged.read_bytes()
    for verb in ("confirm", "finish", "abort"):
        assert "generation 2 is staged" in fails(2, "--direct", verb, staged, "--generation", 3)["message"]
    assert staged.read_bytes() == before
    document = json.loads(works("--direct", "--json", "confirm", staged, "--generation", 2))
    assert document.pop("seqid_after") > document.pop("seqid_before")
    assert document == {
        "device": str(staged), "name": "backup", "generation": 2, "keyslot": 2, "outcome": "committed",
    }  # fmt: skip
    assert not cryptsetup_opens(staged, BACKUP)


def test_a_staged_key_survives_and_forbids_another(staged, secret):
    before = staged.read_bytes()
    arguments = ("-d", secret(KEY), "--new-keyfile", secret(b"third"), *CHEAP)
    for verb in ("stage", "rotate"):
        assert "finish or abort that first" in fails(3, "--direct", verb, staged, *arguments)["message"]
    assert staged.read_bytes() == before


@pytest.mark.parametrize(("time", "status"), [("never", 0), ("45m", 0), ("6w", 0), ("0d", 2), ("30", 2), ("d", 2)])
def test_expiry(enrolled, secret, time, status):
    arguments = ("-d", secret(KEY), "--new-keyfile", secret(NEXT), *CHEAP, "--expires", time)
    done = ctl("--direct", "stage", enrolled, *arguments)
    assert done.returncode == status
    assert ("--expires" in done.stderr.decode()) == (status != 0)
    if status == 0:
        [token] = [token for token in our_tokens(enrolled) if token["state"] == "staged"]
        assert ("expires_at" in token) == (time != "never")


def test_a_generated_key(enrolled, secret, tmp_path):
    done = ctl("--direct", "stage", enrolled, "-d", secret(KEY), "--generate")
    assert done.returncode == 0
    assert GENERATED.fullmatch(done.stdout)
    assert b"staged key backup" in done.stderr
    assert cryptsetup_opens(enrolled, done.stdout)
    works("--direct", "abort", enrolled)
    output = tmp_path / "next.key"
    works("--direct", "stage", enrolled, "-d", secret(KEY), "--generate", "--output", output)
    assert cryptsetup_opens(enrolled, output.read_bytes())


@pytest.mark.parametrize("verb", ["stage", "finish", "abort", "status"])
def test_what_is_not_there(verb, secret, tmp_path, enrolled):
    options = ("-d", secret(KEY), "--new-keyfile", secret(NEXT)) if verb == "stage" else ()
    assert fails(1, "--direct", verb, tmp_path / "none", *options)["error"] == "UnknownDevice"
    if verb != "status":
        assert fails(1, "--direct", verb, enrolled, "--name", "other", *options)["error"] == "UnknownKey"


def test_a_wrong_passphrase(enrolled, secret, tmp_path):
    before = enrolled.read_bytes()
    output = tmp_path / "new.key"
    arguments = ("-d", secret(b"wrong"), "--generate", "--output", output)
    assert fails(1, "--direct", "stage", enrolled, *arguments)["error"] == "WrongCredential"
    assert enrolled.read_bytes() == before
    assert not output.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_it_derives(enrolled, secret, tmp_path, number):
    before = enrolled.read_bytes()
    new = ("--generate", "--output", tmp_path / "new.key")
    with terminal("--direct", "stage", enrolled, "-d", secret(KEY), *new, *ENDLESS) as shown:
        shown.expect(b"deriving keys")
        shown.process.send_signal(number)
        shown.expect(b"interrupted")
        assert shown.end()[1] == 1
    assert enrolled.read_bytes() == before
    assert not (tmp_path / "new.key").exists()


def test_detached_header_and_loop_device(tmp_path, secret):
    header = make_image(tmp_path / "header", detached=True)
    data = tmp_path / "header.data"
    before = data.read_bytes()
    options = ("--header", header)
    works("--direct", "enroll", data, *options, "-d", secret(KEY), "--new-keyfile", secret(BACKUP), *CHEAP)
    stage(data, secret, *options)
    works("--direct", "finish", data, *options)
    assert cryptsetup_opens(header, NEXT)
    assert data.read_bytes() == before
    image = make_image(tmp_path / "image")
    with loop_device(image) as node:
        works("--direct", "enroll", node, "-d", secret(KEY), "--new-keyfile", secret(BACKUP), *CHEAP)
        stage(node, secret)
        works("--direct", "abort", node)
        assert cryptsetup_opens(node, BACKUP)
        assert not cryptsetup_opens(node, NEXT)
