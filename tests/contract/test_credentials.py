# SPDX-License-Identifier: GPL-2.0-or-later
"""Credentials of the service, as systemd lays them down: a directory of files that only root may read."""

import errno
import os
from pathlib import Path

import pytest

from luksrotd.errors import InvalidRequest, SecretRejected
from luksrotd.host.credentials import NAME_MAX, ServiceCredentials


def open_fds():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "disk.key").write_bytes(b"the key\n")
    (tmp_path / "disk.key").chmod(0o400)
    (tmp_path / "link").symlink_to(tmp_path / "disk.key")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


def test_one_that_is_there(directory):
    fd = ServiceCredentials(str(directory)).open("disk.key")
    try:
        assert os.read(fd, 100) == b"the key\n"
        assert not os.get_inheritable(fd)
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.write(fd, b"x")
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", ["a b", "x" * NAME_MAX, "~", "..a", "-"])
def test_names_that_may_be(directory, name):
    (directory / name).write_bytes(b"x")
    os.close(ServiceCredentials(str(directory)).open(name))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "...", "a/b", "/etc/passwd", "../disk.key", "a\0", "a\n", "ä", "a:b", "x" * 256, "\x7f"]
)
def test_names_that_cannot_be(directory, name):
    before = open_fds()
    with pytest.raises(InvalidRequest, match=r"^cannot use the credential: that is no name of one$"):
        ServiceCredentials(str(directory)).open(name)
    assert open_fds() == before


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing", "cannot open the credential: No such file or directory"),
        ("link", "cannot open the credential: Too many levels of symbolic links"),
        ("directory", "cannot use the credential: it is not a regular file"),
        ("fifo", "cannot use the credential: it is not a regular file"),
    ],
)
def test_what_is_none(directory, name, why):
    before = open_fds()
    with pytest.raises(SecretRejected) as caught:
        ServiceCredentials(str(directory)).open(name)
    assert caught.value.message == why
    assert open_fds() == before


def test_a_service_without_any(monkeypatch, directory):
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    for credentials in (ServiceCredentials.of_environment(), ServiceCredentials(str(directory / "nowhere"))):
        with pytest.raises(SecretRejected):
            credentials.open("disk.key")
    with pytest.raises(SecretRejected, match="the service has none"):
        ServiceCredentials.of_environment().open("disk.key")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(directory))
    os.close(ServiceCredentials.of_environment().open("disk.key"))
