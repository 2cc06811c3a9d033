# SPDX-License-Identifier: GPL-2.0-or-later
"""``ports.Inventories``, simulated and real; and what the real one does with files."""

import os
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from luksrotd import names
from luksrotd.errors import StateError
from luksrotd.host.inventory import FileInventories, state_directory
from luksrotd.ports import NoInventories
from luksrotd.rotation.inventory import Entry, Inventory
from tests.support.simhost import SimInventories

UUID = "8A0a1d4e-6a0a-4a57-9d3c-3f9f2d1f0b11"
OTHER = "11111111-2222-4333-8444-555555555555"
ONE = Inventory((Entry(0, "sha256:x", datetime(2026, 1, 1, tzinfo=UTC), None, known=True),))
TWO = Inventory((*ONE.entries, Entry(3, "sha256:y", datetime(2026, 2, 1, tzinfo=UTC), "x-other", known=False)))


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "state" / "luksrotd"


@pytest.fixture(params=["sim", "files"])
def inventories(request, directory):
    return SimInventories() if request.param == "sim" else FileInventories(str(directory))


def test_there_is_none_before_one_is_saved(inventories):
    assert inventories.load(UUID) is None


def test_the_last_one_counts(inventories):
    inventories.save(UUID, ONE)
    inventories.save(UUID, TWO)
    assert inventories.load(UUID) == TWO
    inventories.save(UUID, ONE)
    assert inventories.load(UUID) == ONE


def test_each_volume_has_its_own_whatever_the_case_of_its_uuid(inventories):
    inventories.save(UUID, TWO)
    assert inventories.load(OTHER) is None
    assert inventories.load(UUID.lower()) == inventories.load(UUID.upper()) == TWO


@pytest.mark.parametrize("uuid", ["", "..", "../../etc/passwd", UUID + "/x", UUID[:-1], UUID + "\n"])
def test_a_malformed_uuid_is_refused(inventories, uuid):
    with pytest.raises(StateError, match="malformed"):
        inventories.load(uuid)
    with pytest.raises(StateError, match="malformed"):
        inventories.save(uuid, ONE)


def test_nothing_is_kept_where_nothing_is_to_be_kept():
    nothing = NoInventories()
    nothing.save(UUID, ONE)
    assert nothing.load(UUID) is None


def test_files_are_for_their_owner_alone_and_nothing_else_is_left(directory):
    inventories = FileInventories(str(directory))
    inventories.save(UUID, ONE)
    inventories.save(UUID, TWO)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    (file,) = directory.iterdir()
    assert file.name == f"{UUID.lower()}.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", b"garbage", b"{}", b"\0" * 300000])
def test_garbage_is_told_and_replaced(directory, content):
    inventories = FileInventories(str(directory))
    directory.mkdir(parents=True)
    (directory / f"{UUID.lower()}.json").write_bytes(content)
    with pytest.raises(StateError, match="not what luksrotd has written"):
        inventories.load(UUID)
    inventories.save(UUID, ONE)
    assert inventories.load(UUID) == ONE


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.with_name(f"{OTHER}.json"))])
def test_only_a_regular_file_is_read(directory, make):
    FileInventories(str(directory)).save(OTHER, ONE)
    make(directory / f"{UUID.lower()}.json")
    with pytest.raises(StateError):
        FileInventories(str(directory)).load(UUID)


def test_a_link_is_replaced_and_not_followed(directory, tmp_path):
    directory.mkdir(parents=True)
    (tmp_path / "precious").write_text("precious")
    (directory / f"{UUID.lower()}.json").symlink_to(tmp_path / "precious")
    FileInventories(str(directory)).save(UUID, ONE)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_directory_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").touch()
    inventories = FileInventories(str(tmp_path / "file"))
    with pytest.raises(StateError, match="cannot write the inventory"):
        inventories.save(UUID, ONE)
    with pytest.raises(StateError, match="cannot read the inventory"):
        inventories.load(UUID)


def test_a_write_that_fails_leaves_the_one_before(directory):
    """A full disk: the limit of file sizes stands for it."""
    FileInventories(str(directory)).save(UUID, ONE)
    script = f"""
import resource, signal
from luksrotd.errors import StateError
from tests.contract.test_inventories import FileInventories, TWO, UUID
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    FileInventories({str(directory)!r}).save(UUID, TWO)
except StateError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert len(list(directory.iterdir())) == 1
    assert FileInventories(str(directory)).load(UUID) == ONE


@pytest.mark.parametrize(
    ("environment", "uid", "found"),
    [
        ({}, 0, names.STATE_DIRECTORY),
        ({"STATE_DIRECTORY": "/x"}, 0, "/x"),
        ({"STATE_DIRECTORY": "x", "HOME": "/root"}, 0, names.STATE_DIRECTORY),
        ({"HOME": "/home/u"}, 1000, "/home/u/.local/state/luksrotd"),
        ({"HOME": "/home/u", "XDG_STATE_HOME": "/s"}, 1000, "/s/luksrotd"),
        ({"STATE_DIRECTORY": "/x"}, 1000, "/x"),
    ],
)
def test_where_inventories_are(environment, uid, found):
    assert state_directory(environment, uid=uid) == found


@pytest.mark.parametrize("environment", [{}, {"XDG_STATE_HOME": "relative"}])
def test_nowhere(environment):
    with pytest.raises(StateError, match="HOME is not set"):
        state_directory(environment, uid=1000)


def test_the_directory_of_this_machine_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    FileInventories().save(UUID, ONE)
    assert Path(tmp_path, f"{UUID.lower()}.json").exists()
