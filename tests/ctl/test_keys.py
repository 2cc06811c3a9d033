# SPDX-License-Identifier: GPL-2.0-or-later
"""Where keys come from and go to: generated ones, files, terminals; and that they go nowhere else."""

import json
import os
import re
import signal
import stat
import sys

import pytest

from tests.ctl.conftest import BACKUP, CHEAP, NEXT, ctl, fails, our_tokens, works
from tests.ctl.terminal import terminal
from tests.support.makeimage import KEY, cryptsetup_opens

GENERATED = re.compile(rb"([cbdefghijklnrtuv]{8}-){7}[cbdefghijklnrtuv]{8}")
#: Iterations that outlast every test.
ENDLESS = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", str(2**32 - 1))


def test_generated_key_is_alone_on_standard_output(enrolled, secret):
    done = ctl("--direct", "rotate", enrolled, "-d", secret(KEY), "--generate")
    assert done.returncode == 0
    assert GENERATED.fullmatch(done.stdout)
    assert done.stdout not in done.stderr
    assert cryptsetup_opens(enrolled, done.stdout)
    assert not cryptsetup_opens(enrolled, BACKUP)


def test_only_at_a_sequence_number(enrolled, secret):
    new = ("-d", secret(KEY), "--new-keyfile", secret(NEXT), *CHEAP)
    seqid = json.loads(works("--direct", "--json", "show", enrolled))["seqid"]
    error = fails(6, "--direct", "rotate", enrolled, *new, "--if-generation", seqid + 1)
    assert (error["error"], cryptsetup_opens(enrolled, NEXT)) == ("StaleGeneration", False)
    fails(6, "--direct", "scrub", enrolled, "--if-generation", seqid + 1)
    works("--direct", "scrub", enrolled, "--if-generation", seqid)
    works("--direct", "rotate", enrolled, *new, "--if-generation", seqid)
    assert cryptsetup_opens(enrolled, NEXT)


def test_generated_key_has_a_line_of_a_terminal_to_itself(enrolled, secret):
    with terminal("--direct", "rotate", enrolled, "-d", secret(KEY), "--generate") as shown:
        text, status = shown.end()
    assert status == 0
    key = GENERATED.search(text)
    assert cryptsetup_opens(enrolled, key[0])
    erased = text.rindex(b"\x1b[2K", 0, key.start())
    assert re.sub(rb"\x1b\[[?0-9;]*[A-Za-z]", b"", text[erased : key.start()]).strip() == b""
    assert text[key.end() :].startswith(b"\r\n")


def test_generated_key_into_a_file(enrolled, secret, tmp_path):
    output = tmp_path / "new.key"
    arguments = ("-d", secret(KEY), "--generate", "--output", output)
    document = json.loads(works("--direct", "rotate", enrolled, *arguments, "--json"))
    assert document.pop("seqid_after") > document.pop("seqid_before")
    assert document == {
        "device": str(enrolled), "name": "backup", "generation": 2, "keyslot": 2,
        "outcome": "committed", "output": str(output),
    }  # fmt: skip
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    assert GENERATED.fullmatch(output.read_bytes())
    assert cryptsetup_opens(enrolled, output.read_bytes())
    before = enrolled.read_bytes(), output.read_bytes()
    assert fails(1, "--direct", "rotate", enrolled, *arguments)["error"] == "SecretRejected"
    assert (enrolled.read_bytes(), output.read_bytes()) == before


@pytest.mark.parametrize("wrong", [b"wrong", b""])
def test_the_file_goes_if_nothing_was_committed(enrolled, secret, tmp_path, wrong):
    output = tmp_path / "new.key"
    fails(1, "--direct", "rotate", enrolled, "-d", secret(wrong), "--generate", "--output", output)
    assert not output.exists()


def test_a_file_that_cannot_be_made(enrolled, secret, tmp_path):
    before = enrolled.read_bytes()
    for output in (tmp_path / "no" / "directory", tmp_path, "/proc/new.key"):
        fails(1, "--direct", "rotate", enrolled, "-d", secret(KEY), "--generate", "--output", output)
    assert enrolled.read_bytes() == before


def test_nothing_is_committed_if_nobody_takes_the_key(enrolled, secret):
    before = enrolled.read_bytes()
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    for stdout in (writer, full):
        done = ctl("--direct", "rotate", enrolled, "-d", secret(KEY), "--generate", stdout=stdout)
        os.close(stdout)
        assert done.returncode == 1
        assert b"cannot write the new key" in done.stderr
    assert enrolled.read_bytes() == before


def test_the_key_is_durable_before_the_commit(enrolled, secret, tmp_path):
    """In the order of the system calls: the file and its directory, then the first write to the device."""
    output, log = tmp_path / "new.key", tmp_path / "strace"
    calls = "trace=openat,pwrite64,write,fsync,fdatasync"
    strace = ("strace", "-f", "-yy", "-s", "0", "-e", calls, "-o", str(log))
    works("--direct", "rotate", enrolled, "-d", secret(KEY), "--generate", "--output", output, prefix=strace)
    lines = log.read_text().splitlines()
    key = next(at for at, line in enumerate(lines) if re.search(rf" write\(\d+<{re.escape(str(output))}>", line))
    file_sync = next(at for at, line in enumerate(lines) if re.search(rf"fsync\(\d+<{re.escape(str(output))}>", line))
    folder = next(at for at, line in enumerate(lines) if re.search(rf"fsync\(\d+<{re.escape(str(tmp_path))}>", line))
    device = next(at for at, line in enumerate(lines) if re.search(rf"pwrite64\(\d+<{re.escape(str(enrolled))}>", line))
    assert key < file_sync < folder < device


def test_asks_on_the_terminal(enrolled):
    with terminal("--direct", "rotate", enrolled, *CHEAP) as shown:
        shown.expect(b"Any key of ")
        shown.expect(b": ")
        assert not shown.echoes()
        shown.type(KEY + b"\n")
        for _ in range(2):
            shown.expect(b"New key backup of ")
            shown.expect(b": ")
            shown.type(NEXT + b"\n")
        shown.expect(b"rotated key backup of ")
        rest, status = shown.end()
        assert status == 0
        assert NEXT not in rest
    assert cryptsetup_opens(enrolled, NEXT)


def test_two_entries_that_differ(enrolled, secret):
    before = enrolled.read_bytes()
    with terminal("--direct", "rotate", enrolled, "-d", secret(KEY), *CHEAP) as shown:
        for entry in (b"one\n", b"two\n"):
            shown.expect(b"New key backup of ")
            shown.expect(b": ")
            shown.type(entry)
        shown.expect(b"the two entries differ")
        assert shown.end()[1] == 1
    assert enrolled.read_bytes() == before


def test_interrupted_question_gives_the_echo_back(enrolled):
    with terminal("--direct", "rotate", enrolled) as shown:
        shown.expect(b"Any key of ")
        shown.expect(b": ")
        shown.type(b"\x03")
        shown.expect(b"interrupted")
        assert shown.echoes()
        assert shown.end()[1] == 1


def test_no_terminal_to_ask_on(enrolled):
    document = fails(2, "--direct", "rotate", enrolled, start_new_session=True)
    assert "--key-file" in document["message"]


def test_a_parent_that_ignores_the_end_of_its_children(enrolled, secret):
    ignore = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    deaf = (sys.executable, "-c", ignore)
    done = ctl("--direct", "rotate", enrolled, "-d", secret(KEY), "--new-keyfile", secret(NEXT), *CHEAP, prefix=deaf)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_derivation_leaves_the_device_unchanged(enrolled, secret, number, tmp_path):
    before = enrolled.read_bytes()
    new = ("--generate", "--output", tmp_path / "new.key")
    with terminal("--direct", "rotate", enrolled, "-d", secret(KEY), *new, *ENDLESS) as shown:
        shown.expect(b"deriving keys")
        shown.process.send_signal(number)
        shown.expect(b"interrupted")
        assert shown.end()[1] == 1
    assert enrolled.read_bytes() == before
    assert not (tmp_path / "new.key").exists()


def test_secrets_are_in_no_argument_environment_or_message(enrolled, secret, tmp_path):
    log = tmp_path / "strace"
    calls = "trace=execve,write,sendto,sendmsg"
    strace = ("strace", "-f", "-v", "-s", "65536", "-e", calls, "-o", str(log))
    arguments = ("-d", secret(KEY), "--new-keyfile", secret(NEXT), *CHEAP)
    done = ctl("--direct", "rotate", enrolled, *arguments, prefix=strace)
    assert done.returncode == 0
    traced = log.read_bytes()
    assert b"luksrotd.worker" in traced
    for planted in (KEY, NEXT):
        assert planted not in traced + done.stdout + done.stderr
    assert our_tokens(enrolled)[0]["generation"] == 2
