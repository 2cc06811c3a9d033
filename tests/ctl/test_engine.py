# SPDX-License-Identifier: GPL-2.0-or-later
"""--engine stepwise, judged by the stock tools."""

import pytest

from tests.ctl.conftest import BACKUP, CHEAP, LUKSROTCTL, NEXT, environment, fails, loop_device, our_tokens, works
from tests.support.makeimage import KEY, cryptsetup_opens, luks_dump_json
from tests.support.recorder import record

STEPS = ("--engine", "stepwise")


def test_every_verb_in_steps(image, secret):
    key, backup, following = secret(KEY), secret(BACKUP), secret(NEXT)
    works("--direct", "enroll", image, *STEPS, "-d", key, "--new-keyfile", backup, "--data", '{"ref": 1}', *CHEAP)
    assert cryptsetup_opens(image, BACKUP)
    works("--direct", "set-data", image, *STEPS, "--data", '{"ref": 2}')
    works("--direct", "rotate", image, *STEPS, "-d", backup, "--new-keyfile", following, *CHEAP)
    assert (cryptsetup_opens(image, BACKUP), cryptsetup_opens(image, NEXT)) == (False, True)
    [token] = our_tokens(image)
    assert (token["generation"], token["data"]) == (2, {"ref": 2})
    assert "retires" not in token
    works("--direct", "stage", image, *STEPS, "-d", key, "--new-keyfile", backup, *CHEAP)
    assert cryptsetup_opens(image, BACKUP)
    works("--direct", "abort", image, *STEPS)
    assert (cryptsetup_opens(image, BACKUP), cryptsetup_opens(image, NEXT)) == (False, True)
    works("--direct", "stage", image, *STEPS, "-d", key, "--new-keyfile", backup, *CHEAP)
    works("--direct", "finish", image, *STEPS)
    assert (cryptsetup_opens(image, BACKUP), cryptsetup_opens(image, NEXT)) == (True, False)
    works("--direct", "remove", image, *STEPS, "-d", key)
    metadata = luks_dump_json(image)
    assert (list(metadata["keyslots"]), metadata["tokens"]) == (["0"], {})
    assert cryptsetup_opens(image, KEY)


def test_on_a_block_device(enrolled, secret):
    with loop_device(enrolled) as node:
        works("--direct", "rotate", node, *STEPS, "-d", secret(KEY), "--new-keyfile", secret(NEXT), *CHEAP)
        assert cryptsetup_opens(node, NEXT)
    works("--direct", "reconcile", enrolled)
    assert not cryptsetup_opens(enrolled, BACKUP)


def test_a_generated_key(enrolled, secret):
    key = works("--direct", "rotate", enrolled, *STEPS, "-d", secret(KEY), "--generate")
    assert cryptsetup_opens(enrolled, key.encode())


def test_the_header_is_written_as_libcryptsetup_writes_it(enrolled, secret):
    """A header, then its JSON, then the header again with its checksum: luksrotd itself writes a copy in one go."""
    arguments = ["-d", str(secret(KEY)), "--new-keyfile", str(secret(NEXT)), *CHEAP]
    command = [*LUKSROTCTL, "--direct", "rotate", str(enrolled), *STEPS, *arguments]
    recording = record(command, enrolled, environment=environment())
    assert recording.status == 0, recording.stderr
    headers = [epoch for epoch in recording.epochs if epoch and epoch[0].offset < 32768]
    assert len(headers) == 10
    for epoch in headers:
        start = epoch[0].offset
        assert [write.offset for write in epoch] == [start, start + 4096, start]
        assert epoch[0].data[448:512] == bytes(64) != epoch[2].data[448:512]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rotate", "/dev/null", *STEPS], "over the bus"),
        (["--direct", "finish", "/dev/null", "/dev/zero", *STEPS], "exactly one"),
        (["--direct", "stage", "/dev/null", "--set", "x", *STEPS], "exactly one"),
        (["--direct", "rotate", "/dev/null", "--engine", "steam"], "invalid choice"),
        (["--direct", "reconcile", "/dev/null", *STEPS], "unrecognized arguments"),
    ],
)
def test_what_it_does_not_do(arguments, message):
    assert message in fails(2, *arguments)["message"]


def test_a_wrong_key_changes_nothing(enrolled, secret):
    before = enrolled.read_bytes()
    arguments = ["-d", secret(b"wrong"), "--new-keyfile", secret(NEXT), *CHEAP]
    failed = fails(1, "--direct", "rotate", enrolled, *STEPS, *arguments)
    assert (failed["error"], failed["outcome"]) == ("WrongCredential", "unchanged")
    assert enrolled.read_bytes() == before
