# SPDX-License-Identifier: GPL-2.0-or-later
"""``luksrotctl header``: on image files, beside what cryptsetup does with the same backups."""

import json
import shutil
import stat
import subprocess

import pytest

from tests.ctl.conftest import BACKUP, CHEAP, NEXT, ctl, fails, loop_device, our_tokens, works
from tests.ctl.terminal import terminal
from tests.support.makeimage import KEY, add_key, cryptsetup_opens, luks_dump_json, make_image, run

THIRD = b"the backup key, generation 3"
SECRETS = (KEY, BACKUP, NEXT, THIRD)


def header(verb, *arguments, **streams):
    return works("--direct", "header", verb, *arguments, **streams)


def restored(image, file, *options):
    """The JSON document of a restore."""
    return json.loads(header("restore", image, file, "--yes", "--json", *options))


def opened(image):
    return [cryptsetup_opens(image, secret) for secret in SECRETS]


@pytest.fixture
def saved(enrolled, tmp_path):
    """A backup of the image with generation 1."""
    file = tmp_path / "saved.img"
    header("backup", enrolled, file)
    return file


@pytest.fixture
def rotated(enrolled, saved, secret):
    """The image, rotated twice since: where the key of the backup was, another one is."""
    for new in (NEXT, THIRD):
        key = secret(KEY)
        works("--direct", "rotate", enrolled, "--key-file", key, "--new-keyfile", secret(new), *CHEAP)
    return enrolled


def test_a_backup_is_what_cryptsetup_would_make_of_it(enrolled, saved, tmp_path):
    theirs = tmp_path / "theirs.img"
    run("luksHeaderBackup", str(enrolled), "--header-backup-file", str(theirs))
    ours, other = saved.read_bytes(), theirs.read_bytes()
    assert len(ours) == len(other)
    assert ours[:32768] == other[:32768]
    taken = set()
    for slot in luks_dump_json(enrolled)["keyslots"].values():
        start, size = int(slot["area"]["offset"]), int(slot["area"]["size"])
        assert ours[start : start + size] == other[start : start + size] != bytes(size)
        taken.update(range(start, start + size, 4096))
    free = [at for at in range(32768, len(ours), 4096) if at not in taken]
    assert all(ours[at : at + 4096] == bytes(4096) for at in free), "nothing that no keyslot names"
    assert stat.S_IMODE(saved.stat().st_mode) == 0o400


def test_a_backup_says_what_it_is(enrolled, tmp_path):
    document = json.loads(header("backup", enrolled, tmp_path / "new", "--json"))
    assert document["uuid"] == run("luksUUID", str(enrolled)).strip()
    assert (document["keyslots"], document["size"]) == ([0, 1], (tmp_path / "new").stat().st_size)
    assert fails(2, "--direct", "header", "backup", enrolled, tmp_path / "new")["error"] == "InvalidArgs"


def test_a_backup_needs_a_volume_in_order(enrolled, tmp_path):
    with enrolled.open("r+b") as file:
        file.write(bytes(4096))
    assert fails(1, "--direct", "header", "backup", enrolled, tmp_path / "new")["error"] == "NeedsReconcile"
    assert not (tmp_path / "new").exists()


def test_the_end_is_the_same_as_cryptsetups(rotated, saved, tmp_path):
    stock = tmp_path / "stock"
    shutil.copy(rotated, stock)
    run("luksHeaderRestore", str(stock), "--header-backup-file", str(saved))
    before = luks_dump_json(rotated)
    document = restored(rotated, saved)
    assert opened(rotated) == opened(stock) == [True, True, False, False]
    assert document["moved_keyslots"] == [1]
    assert document["outcome"] == "committed"
    assert document["seqid_after"] > document["seqid_before"]
    ours, theirs = luks_dump_json(rotated), luks_dump_json(stock)
    for side in (ours, theirs):  # what is allowed to differ: where the moved keyslot lies
        side["keyslots"]["1"]["area"].pop("offset")
        side["tokens"]["0"].pop("fingerprint")
    assert ours == theirs != before
    assert works("--direct", "reconcile", rotated).endswith("clean\n")
    works(
        "--direct",
        "rotate",
        rotated,
        "--key-file",
        _key(tmp_path, BACKUP),
        "--new-keyfile",
        _key(tmp_path, b"x"),
        *CHEAP,
    )
    assert our_tokens(rotated)[0]["generation"] == 2


def _key(folder, content):
    path = folder / f"file-{len(content)}"
    path.write_bytes(content)
    return path


def test_a_backup_of_cryptsetup_is_restored(enrolled, secret, tmp_path):
    file = tmp_path / "theirs.img"
    run("luksHeaderBackup", str(enrolled), "--header-backup-file", str(file))
    add_key(enrolled, KEY, NEXT)
    works("--direct", "rotate", enrolled, "--key-file", secret(KEY), "--new-keyfile", secret(THIRD), *CHEAP)
    restored(enrolled, file)
    assert opened(enrolled) == [True, True, False, False]


def test_cryptsetup_restores_our_backup(rotated, saved):
    run("luksHeaderRestore", str(rotated), "--header-backup-file", str(saved))
    assert opened(rotated) == [True, True, False, False]
    assert json.loads(header("restore", rotated, saved, "--dry-run", "--json"))["differences"] == []


def test_a_dry_run_shows_the_difference_and_changes_nothing(rotated, saved):
    before = rotated.read_bytes()
    text = header("restore", rotated, saved, "--dry-run")
    assert "key backup generation 3, keyslot 1" in text
    assert "key backup generation 1, keyslot 1" in text
    assert "the passphrases of keyslots 1 of the backup open the volume again" in text
    assert rotated.read_bytes() == before


def test_a_second_restore_writes_nothing(rotated, saved):
    restored(rotated, saved)
    before = rotated.read_bytes()
    document = restored(rotated, saved)
    assert (document["outcome"], document["differences"]) == ("unchanged", [])
    assert "nothing was written" in header("restore", rotated, saved, "--yes")
    assert rotated.read_bytes() == before


def test_the_key_that_must_open_the_restored_header(rotated, saved, secret):
    before = rotated.read_bytes()
    arguments = ("--direct", "header", "restore", rotated, saved, "--yes", "--key-file")
    assert fails(1, *arguments, secret(THIRD))["error"] == "WrongCredential"
    assert rotated.read_bytes() == before
    works(*arguments, "-", stdin=BACKUP)
    assert opened(rotated) == [True, True, False, False]


def test_without_a_terminal_nobody_is_asked(rotated, saved):
    before = rotated.read_bytes()
    assert fails(2, "--direct", "header", "restore", rotated, saved)["error"] == "InvalidArgs"
    assert fails(2, "--direct", "header", "restore", rotated, saved, "--yes", "--dry-run")["error"] == "InvalidArgs"
    done = ctl("--direct", "header", "restore", rotated, saved)
    assert (done.returncode, done.stderr.startswith(b"luksrotctl: cannot ask")) == (2, True)
    assert rotated.read_bytes() == before


@pytest.mark.parametrize(("answer", "status"), [(b"yes", 0), (b"y", 1), (b"", 1)])
def test_on_a_terminal_it_asks(rotated, saved, answer, status):
    before = rotated.read_bytes()
    with terminal("--direct", "header", "restore", rotated, saved) as screen:
        shown = screen.expect(b"Type yes: ")
        assert b"generation 3" in shown
        screen.type(answer + b"\n")
        _, code = screen.end()
    assert code == status
    assert (rotated.read_bytes() == before) is bool(status)


def test_another_volume_is_refused(saved, tmp_path):
    other = make_image(tmp_path / "other", key=b"another")
    before = other.read_bytes()
    document = fails(1, "--direct", "header", "restore", other, saved, "--yes")
    assert (document["error"], document["outcome"]) == ("BackupMismatch", "unchanged")
    assert other.read_bytes() == before


def test_the_same_volume_under_another_volume_key_is_refused(enrolled, saved, tmp_path):
    """As after a re-encryption: cryptsetup would restore it, and the data were lost."""
    size = enrolled.stat().st_size
    enrolled.write_bytes(bytes(size))
    uuid = luks_uuid(saved)
    run("luksFormat", "--type", "luks2", "--uuid", uuid, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
        "--key-size", "512", "--key-file", "-", str(enrolled), stdin=KEY)  # fmt: skip
    before = enrolled.read_bytes()
    document = fails(1, "--direct", "header", "restore", enrolled, saved, "--yes")
    assert "another volume key" in document["message"]
    assert enrolled.read_bytes() == before


def luks_uuid(path):
    return run("luksUUID", str(path)).strip()


@pytest.mark.parametrize(
    ("content", "error"), [(b"", "BadFormat"), (bytes(1 << 20), "BadFormat"), (None, "UnknownDevice")]
)
def test_what_is_no_backup_is_refused(enrolled, tmp_path, content, error):
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    assert fails(1, "--direct", "header", "restore", enrolled, file, "--yes")["error"] == error


def test_a_lost_header_comes_back_with_force(rotated, saved):
    with rotated.open("r+b") as file:
        file.write(bytes(32768))
    assert fails(1, "--direct", "header", "restore", rotated, saved, "--yes")["error"] == "UnknownDevice"
    document = restored(rotated, saved, "--force")
    assert (document["header_lost"], document["seqid_before"]) == (True, 0)
    assert opened(rotated) == [True, True, False, False]


def test_force_does_not_write_over_another_signature(rotated, saved):
    with rotated.open("r+b") as file:
        file.write(bytes(32768))
    with loop_device(rotated) as node:
        subprocess.run(["mkfs.ext4", "-q", "-F", node], check=True, capture_output=True)
        before = rotated.read_bytes()
        document = fails(1, "--direct", "header", "restore", node, saved, "--yes", "--force")
    assert document["error"] == "ForeignSignature"
    assert rotated.read_bytes() == before


def test_a_block_device_and_a_detached_header(rotated, saved, tmp_path):
    with loop_device(rotated, 4096) as node:
        restored(node, saved)
    assert opened(rotated) == [True, True, False, False]
    apart = make_image(tmp_path / "header", detached=True)
    data = apart.with_name("header.data")
    file = tmp_path / "detached.img"
    header("backup", data, file, "--header", apart)
    add_key(apart, KEY, NEXT)
    restored(data, file, "--header", apart)
    assert cryptsetup_opens(apart, KEY)
    assert not cryptsetup_opens(apart, NEXT)


def test_over_the_bus_there_is_none(enrolled, tmp_path):
    assert fails(2, "header", "backup", enrolled, tmp_path / "new")["error"] == "InvalidArgs"
