# SPDX-License-Identifier: GPL-2.0-or-later
"""``ports.HeaderFiles``, simulated and real."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from luksrotd.errors import DeviceError, InvalidRequest, UnknownDevice
from luksrotd.host.backupfile import BackupFiles
from tests.contract.conftest import mounted
from tests.support.simfiles import SimFiles

CONTENT = os.urandom(3 * 1024 * 1024 + 5)
HEADERS = 32768


@pytest.fixture(params=[SimFiles, BackupFiles], ids=["sim", "host"])
def files(request):
    return request.param()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "backup")


def test_what_is_written_is_read(files, path):
    files.create(path, CONTENT, HEADERS)
    assert files.read(path, 1 << 30) == CONTENT
    assert files.read(path, 5) == CONTENT[:5]
    assert files.read(path, 0) == b""


def test_nothing_is_ever_overwritten(files, path):
    files.create(path, b"first", 1)
    with pytest.raises(InvalidRequest, match="something of that name"):
        files.create(path, CONTENT, HEADERS)
    assert files.read(path, 100) == b"first"


def test_a_file_that_is_not_there(files, path):
    with pytest.raises(UnknownDevice, match="No such file"):
        files.read(path, 1)


def test_no_room(tmp_path):
    sim = SimFiles()
    sim.full = True
    with pytest.raises(DeviceError, match="No space left"):
        sim.create("backup", CONTENT, HEADERS)
    assert sim.content == {}
    with mounted("tmpfs", tmp_path / "small", "size=1m") as where:
        with pytest.raises(DeviceError, match="No space left"):
            BackupFiles().create(str(where / "backup"), CONTENT, HEADERS)
        assert list(where.iterdir()) == [], "what was begun is removed"


# ---- the real one alone


def test_only_its_owner_may_read_it(path):
    before = os.umask(0o777)
    try:
        BackupFiles().create(path, CONTENT, HEADERS)
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o400


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: Path(path).symlink_to("/nowhere")])
def test_a_name_that_is_taken_by_something_else(path, make):
    make(path)
    with pytest.raises(InvalidRequest, match="something of that name"):
        BackupFiles().create(path, CONTENT, HEADERS)
    assert os.path.lexists(path)


@pytest.mark.parametrize("name", ["missing/backup", "\0"])
def test_a_name_that_cannot_be(tmp_path, name):
    with pytest.raises(DeviceError, match="cannot write"):
        BackupFiles().create(f"{tmp_path}/{name}", CONTENT, HEADERS)


def test_a_name_that_is_no_path_cannot_be_read():
    with pytest.raises(DeviceError, match="not a path"):
        BackupFiles().read("\0", 1)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_only_regular_files_are_read_and_a_pipe_is_not_waited_for(path, make):
    make(path)
    with pytest.raises((InvalidRequest, DeviceError), match=r"not a regular file|Is a directory"):
        BackupFiles().read(path, 1)


def test_the_header_comes_last_each_part_behind_a_flush(tmp_path):
    """What a power cut leaves is no backup, or a whole one."""
    code = (
        "import sys; from luksrotd.host.backupfile import BackupFiles; "
        f"BackupFiles().create(sys.argv[1], bytes(65536) + b'x' * 65536, {HEADERS})"
    )
    log, path = tmp_path / "log", tmp_path / "backup"
    trace = ["strace", "-y", "-s", "0", "-e", "trace=pwrite64,fsync,fdatasync", "-o", str(log)]
    subprocess.run([*trace, sys.executable, "-c", code, str(path)], check=True)
    calls = [line for line in log.read_text().splitlines() if str(tmp_path) in line]
    seen = [(line.split("(")[0], line.split(", ")[-2:]) for line in calls]
    assert [name for name, _ in seen] == ["pwrite64", "fsync", "pwrite64", "fsync", "fsync"]
    offsets = [int(rest[1].split(")")[0]) for name, rest in seen if name == "pwrite64"]
    assert offsets == [HEADERS, 0]
    assert f"<{tmp_path}>" in calls[-1], "the name is made durable, too"
