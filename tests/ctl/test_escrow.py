# SPDX-License-Identifier: GPL-2.0-or-later
"""--escrow: the new key is with the escrow before anything is written, and with nobody else."""

import json
import os
import signal
import subprocess
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest

from luksrotd.ctl import newkey
from luksrotd.errors import DeviceError, Outcome
from tests.ctl.conftest import BACKUP, LUKSROTCTL, ctl, die_with_parent, environment, fails, our_tokens, works
from tests.support.escrow import DATA, Escrow
from tests.support.escrow import KEY as GENERATED
from tests.support.makeimage import KEY, cryptsetup_opens, luks_dump_json, run


@pytest.fixture
def escrow(tmp_path):
    return Escrow(tmp_path / "escrow")


@pytest.fixture
def rotate(enrolled, secret, escrow):
    """A command line that would work."""
    return ("--direct", "rotate", enrolled, "-d", secret(KEY), "--generate", "--escrow", escrow.path)


@pytest.fixture
def unchanged(enrolled):
    before = enrolled.read_bytes()
    yield
    assert enrolled.read_bytes() == before


def newest(image):
    return max(our_tokens(image), key=lambda token: token["generation"])


@pytest.mark.parametrize(
    ("verb", "more", "generation"),
    [
        ("rotate", [], 2),
        ("rotate", ["--engine", "stepwise"], 2),
        ("stage", [], 2),
        ("enroll", ["--name", "second"], 1),
    ],
)
def test_the_escrow_has_the_key_and_says_what_the_data_is(enrolled, secret, escrow, verb, more, generation):
    printed = works(
        "--direct", verb, enrolled, "-d", secret(KEY), "--generate", "--escrow", escrow.path, "--json", *more
    )
    token = newest(enrolled) if verb != "enroll" else next(t for t in our_tokens(enrolled) if t["name"] == "second")
    assert (token["generation"], token["data"]) == (generation, DATA)
    [keyslot] = token["keyslots"]
    assert GENERATED.fullmatch(escrow.key)
    assert cryptsetup_opens(enrolled, escrow.key, int(keyslot))
    assert cryptsetup_opens(enrolled, BACKUP) == (verb != "rotate")
    assert escrow.facts == {
        "VERB": verb,
        "UUID": run("luksUUID", str(enrolled)).strip(),
        "DEVICE": str(enrolled),
        "NAME": token["name"],
        "GENERATION": str(generation),
    }
    document = json.loads(printed)
    assert (document["escrow"], document["generation"]) == (str(escrow.path), generation)
    assert escrow.key not in printed.encode()
    kdf = luks_dump_json(enrolled)["keyslots"][keyslot]["kdf"]
    assert (kdf["type"], kdf["iterations"]) == ("pbkdf2", 1000)


@pytest.mark.parametrize("says", ["true", "echo"])
@pytest.mark.parametrize(("data", "kept"), [([], {"first": True}), (["--data", '{"given": 1}'], {"given": 1})])
def test_an_escrow_that_says_nothing_keeps_the_data(enrolled, rotate, escrow, says, data, kept):
    works("--direct", "set-data", enrolled, "--data", '{"first": true}')
    escrow.does(says)
    assert "has got the new key" in works(*rotate, *data)
    assert newest(enrolled)["data"] == kept
    assert cryptsetup_opens(enrolled, escrow.key)


def test_the_end_of_the_escrow_counts_and_not_that_of_its_children(enrolled, rotate, escrow):
    """One that holds standard output for ever."""
    escrow.does('sleep infinity & echo $! >"$0.pid"')
    works(*rotate)
    assert is_gone(int(escrow.path.with_suffix(".pid").read_text()))
    assert cryptsetup_opens(enrolled, escrow.key)


def is_gone(pid):
    """Whether it has ended, whoever has to wait for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "its exit status is 3"),
        ("kill -SEGV $$", "it ended by signal 11"),
        ("echo nonsense", "it is not JSON"),
        ("echo '[1]'", "it is not a JSON object"),
        ("echo '{\"a\": NaN}'", "it is not JSON"),
        ('printf \'{"a": "\\377"}\'', "is not UTF-8"),
        ("exec cat /dev/zero", "it prints more than 1048576 bytes"),
        ("exec yes", "it prints more than 1048576 bytes"),
        ('printf \'{"key": "%s"}\' "$(cat "$0.key")"', "it prints the key"),
        ("echo '{}'; exit 1", "its exit status is 1"),
    ],
)
def test_an_escrow_that_fails(rotate, escrow, script, reason):
    escrow.does(script)
    error = fails(1, *rotate)
    assert (error["error"], error["outcome"]) == ("SecretRejected", "unchanged")
    assert reason in error["message"]
    assert escrow.key.decode() not in json.dumps(error)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("takes", ["", "head -c 70 >/dev/null\n"])
def test_an_escrow_that_does_not_read_the_key(rotate, escrow, takes):
    escrow.does("exit 0", takes=takes)
    assert "it has not read the key" in fails(1, *rotate)["message"]


@pytest.mark.usefixtures("unchanged")
def test_an_escrow_that_cannot_be_run(rotate, escrow):
    escrow.does("", interpreter="/nowhere")
    assert "No such file" in fails(1, *rotate)["message"]
    escrow.path.write_bytes(b"\x7fELF")
    assert "Exec format error" in fails(1, *rotate)["message"]


@pytest.mark.usefixtures("unchanged")
def test_an_escrow_that_hangs(rotate, escrow):
    escrow.does('sleep infinity & echo $$ $! >"$0.pids"; trap "" TERM; wait; sleep infinity')
    assert "does not come to an end" in fails(1, *rotate, "--escrow-timeout", "1")["message"]
    pids = escrow.path.with_suffix(".pids").read_text().split()
    assert len(pids) == 2
    assert all(is_gone(int(pid)) for pid in pids)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_escrow(rotate, escrow, tmp_path, number):
    os.mkfifo(tmp_path / "there")
    escrow.does(f'echo $$ >"{tmp_path}/there"; exec sleep infinity')
    argv = [*LUKSROTCTL, "--json", *map(str, rotate)]
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, preexec_fn=die_with_parent) as process:  # noqa: PLW1509 -- no threads here
        pid = int((tmp_path / "there").read_text())
        process.send_signal(number)
        error = json.loads(process.stdout.read())
    assert (process.returncode, error["error"], error["outcome"]) == (1, "Cancelled", "unchanged")
    assert is_gone(pid)


@pytest.mark.usefixtures("unchanged")
def test_a_crash_leaves_a_key_that_opens_nothing(enrolled, rotate, escrow):
    escrow.does("kill -KILL $PPID")
    assert ctl(*rotate).returncode == -signal.SIGKILL
    assert not cryptsetup_opens(enrolled, escrow.key)
    assert cryptsetup_opens(enrolled, BACKUP)


@pytest.mark.usefixtures("unchanged")
def test_a_credential_that_is_wrong_leaves_a_key_that_opens_nothing(enrolled, secret, escrow):
    error = fails(1, "--direct", "rotate", enrolled, "-d", secret(b"wrong"), "--generate", "--escrow", escrow.path)
    assert error["error"] == "WrongCredential"
    assert "has got opens nothing" in error["message"]
    assert not cryptsetup_opens(enrolled, escrow.key)


@pytest.mark.parametrize("flush", range(1, 7))
def test_a_disk_that_fails_leaves_a_key_that_is_to_be_kept_unless_nothing_was_changed(enrolled, rotate, escrow, flush):
    """The kernel says that a flush has failed; what the disk holds, it does not say."""
    broken = ("strace", "-f", "-o", "/dev/null", "-e", f"inject=fdatasync:error=EIO:when={flush}+")
    done = ctl("--json", *rotate, prefix=broken)
    error = json.loads(done.stdout)
    opened = cryptsetup_opens(enrolled, escrow.key)
    told = error["message"].partition(" has got ")[2]
    if told == "opens nothing":
        assert (done.returncode, error["outcome"], opened) == (1, "unchanged", False)
    elif told == "opens the volume":
        assert (done.returncode, opened) == (4, True)
    else:
        assert (done.returncode, told) == (4, "may open the volume: keep it, and the old one")
        assert opened or cryptsetup_opens(enrolled, BACKUP)
    assert (told == "opens nothing") == (flush == 1)


@pytest.mark.parametrize(
    ("outcome", "worth"),
    [
        (Outcome.UNCHANGED, "opens nothing"),
        (Outcome.UNKNOWN, "may open the volume: keep it, and the old one"),
        (Outcome.WIPE_PENDING, "opens the volume"),
        (Outcome.COMMITTED, "opens the volume"),
    ],
)
def test_what_the_key_in_the_escrow_is_worth_after_an_error(monkeypatch, outcome, worth):
    def fail(*_):
        raise DeviceError("cannot write", outcome=outcome)

    monkeypatch.setattr(newkey, "change", fail)
    monkeypatch.setattr(newkey.escrow, "give", lambda *_: None)
    with pytest.raises(DeviceError) as raised:
        newkey._in_escrow(Namespace(escrow_timeout=1), "/vault", Namespace(new=0), newkey._Seen(1, {}))
    assert raised.value.message == f"cannot write; the key that /vault has got {worth}"
    assert raised.value.outcome is outcome


def test_a_header_that_changes_meanwhile(enrolled, rotate, escrow):
    luksrotctl = " ".join(LUKSROTCTL)
    escrow.does(f"{luksrotctl} --direct set-data {enrolled} --data '{{}}' >&2")
    error = fails(6, *rotate)
    assert error["error"] == "StaleGeneration"
    assert "has got opens nothing" in error["message"]
    assert newest(enrolled)["generation"] == 1
    assert cryptsetup_opens(enrolled, BACKUP)


def test_what_a_crash_has_left_is_finished_first(enrolled, rotate, escrow):
    stale = enrolled.read_bytes()[16384:32768]
    works("--direct", "set-data", enrolled, "--data", '{"later": 1}')
    with enrolled.open("r+b") as file:
        file.seek(16384)
        file.write(stale)
    works(*rotate)
    assert (newest(enrolled)["generation"], newest(enrolled)["data"]) == (2, DATA)
    assert cryptsetup_opens(enrolled, escrow.key)


@pytest.mark.usefixtures("unchanged")
def test_no_key_is_made_for_nothing(enrolled, secret, escrow):
    new = ("-d", secret(KEY), "--generate", "--escrow", escrow.path)
    assert fails(1, "--direct", "enroll", enrolled, *new)["error"] == "KeyExists"
    assert fails(1, "--direct", "rotate", enrolled, "--name", "other", *new)["error"] == "UnknownKey"
    assert fails(6, "--direct", "rotate", enrolled, "--if-generation", "1", *new)["error"] == "StaleGeneration"
    assert not escrow.was_run


def writable_file(escrow):
    escrow.path.chmod(0o757)


def writable_by_group(escrow):
    escrow.path.chmod(0o775)


def writable_folder(escrow):
    escrow.path.parent.chmod(0o1777)


def writable_folder_above(escrow):
    escrow.path.parent.parent.chmod(0o777)


def of_somebody_else(escrow):
    os.chown(escrow.path, 65534, 65534)


def folder_of_somebody_else(escrow):
    os.chown(escrow.path.parent, 65534, 65534)


def link_in_a_writable_folder(escrow):
    folder = escrow.path.parent / "open"
    folder.mkdir()
    folder.chmod(0o777)
    target = escrow.path.rename(escrow.path.with_name("real"))
    (folder / "escrow").symlink_to(target)
    escrow.path = folder / "escrow"


def not_executable(escrow):
    escrow.path.chmod(0o644)


def folder_itself(escrow):
    escrow.path = escrow.path.parent


def missing(escrow):
    escrow.path.unlink()


def relative(escrow):
    escrow.path = os.path.relpath(escrow.path)


UNUSABLE = [
    writable_file,
    writable_by_group,
    writable_folder,
    writable_folder_above,
    of_somebody_else,
    folder_of_somebody_else,
    link_in_a_writable_folder,
    not_executable,
    folder_itself,
    missing,
    relative,
]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("spoil", UNUSABLE, ids=lambda spoil: spoil.__name__)
def test_an_escrow_that_is_not_to_be_trusted_is_not_run(enrolled, secret, escrow, spoil):
    before, beside = escrow.path, escrow.was_run
    spoil(escrow)
    error = fails(2, "--direct", "rotate", enrolled, "-d", secret(KEY), "--generate", "--escrow", escrow.path)
    assert error["message"].startswith("cannot use the escrow command ")
    assert not beside
    assert not before.with_suffix(".key").exists()


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "wrong",
    [
        ["rotate", "--escrow", "/bin/true"],
        ["rotate", "--escrow", "/bin/true", "--generate", "--output", "/nowhere/key"],
        ["rotate", "--escrow", "/bin/true", "--generate", "--escrow-timeout", "0"],
        ["rotate", "--escrow", "/bin/true", "--generate", "--escrow-timeout", "soon"],
        ["stage", "--escrow", "/bin/true", "--generate", "--set", "x"],
        ["stage", "/dev/null", "--escrow", "/bin/true", "--generate"],
        ["recreate", "--escrow", "/bin/true", "--generate"],
    ],
)
def test_options_that_do_not_go_together(enrolled, secret, wrong):
    assert fails(2, "--direct", *wrong, enrolled, "-d", secret(KEY))["error"] == "InvalidArgs"


def test_a_user_has_an_escrow_of_his_own():
    """What matters for root does not for him: all that he could do to it he may do to himself."""
    code = (
        "import os, sys, luksrotd.ctl.local, luksrotd.ctl.escrow as escrow\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "print(escrow.checked(sys.argv[1]))"
    )
    with tempfile.TemporaryDirectory() as folder:  # one that he can reach
        program = Path(folder, "escrow")
        program.touch(0o777)
        for path in (program, program.parent):
            os.chown(path, 65534, 65534)
        argv = [LUKSROTCTL[0], "-c", code, program]
        done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == (f"{program}\n", "")


def test_the_key_leaves_no_trace(enrolled, rotate, escrow, tmp_path):
    for name in ("there", "go"):
        os.mkfifo(tmp_path / name)
    escrow.does(f'echo >"{tmp_path}/there"; read line <"{tmp_path}/go"; echo escrow heard >&2')
    argv = [*LUKSROTCTL, *map(str, rotate)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(argv, env=environment(), preexec_fn=die_with_parent, **pipes) as process:  # noqa: PLW1509 -- no threads here
        (tmp_path / "there").read_text()
        seen = [text for pid in Path("/proc").glob("[0-9]*") for text in looked_at(pid)]
        (tmp_path / "go").write_text("\n")
        out, err = process.communicate()
    assert (process.returncode, err) == (0, b"escrow heard\n")
    assert GENERATED.fullmatch(escrow.key)
    assert any(str(escrow.path).encode() in text for text in seen), "its processes were looked at"
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != escrow.path.with_suffix(".key")]
    assert enrolled in files
    for text in (*seen, out, *(path.read_bytes() for path in files)):
        assert escrow.key not in text


def looked_at(process):
    """Command line and environment."""
    for name in ("cmdline", "environ"):
        try:
            yield (process / name).read_bytes()
        except OSError:
            continue
