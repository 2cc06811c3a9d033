# SPDX-License-Identifier: GPL-2.0-or-later
"""Which files are the configuration, in which order, and which are refused."""

import os
import socket

import pytest

from luksrotd.errors import ConfigError
from luksrotd.host import configfiles
from tests.contract.conftest import open_descriptors


@pytest.fixture
def system(tmp_path):
    """``system("etc/x.conf", "text")`` writes a file; ``read()`` is the real thing on the tree."""
    return System(tmp_path)


class System:
    def __init__(self, root):
        self.root = root
        self.directories = [root / where / "luksrotd.conf.d" for where in ("lib", "run", "etc")]

    def put(self, path, text=""):
        file = self.root / path.replace(".d/", "/luksrotd.conf.d/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o644)
        return file

    def read(self):
        texts = configfiles.read(str(self.root / "etc/luksrotd.conf"), [str(path) for path in self.directories])
        assert all(text.path.startswith(f"{self.root}/") for text in texts)
        return [text.content.decode() for text in texts]


def test_no_file_is_no_text(system):
    assert system.read() == []


def test_the_main_file_comes_first_and_drop_ins_by_name(system):
    system.put("lib.d/50-b.conf", "lib 50")
    system.put("etc.d/10-a.conf", "etc 10")
    system.put("run.d/90-c.conf", "run 90")
    system.put("etc/luksrotd.conf", "main")
    assert system.read() == ["main", "etc 10", "lib 50", "run 90"]


def test_of_one_name_the_weightiest_directory_counts(system):
    for where in ("lib", "run", "etc"):
        system.put(f"{where}.d/a.conf", where)
    assert system.read() == ["etc"]
    system.put("etc.d/a.conf").unlink()
    assert system.read() == ["run"]


def test_a_link_to_dev_null_masks(system):
    system.put("lib.d/a.conf", "lib")
    system.put("lib.d/b.conf", "b")
    system.put("etc.d/a.conf").unlink()
    (system.directories[2] / "a.conf").symlink_to("/dev/null")
    assert system.read() == ["b"]


def test_other_files_are_not_drop_ins(system):
    for name in ("a.conf.dpkg-old", "README", ".a.conf", ".conf"):
        system.put(f"etc.d/{name}", "x")
    assert system.read() == []


def test_a_link_to_a_file_is_followed(system):
    system.put("elsewhere", "x")
    system.put("etc/luksrotd.conf").unlink()
    (system.root / "etc/luksrotd.conf").symlink_to(system.root / "elsewhere")
    assert system.read() == ["x"]


def _foreign(file):
    os.chown(file, 65534, 0)


def _writable(file):
    file.chmod(0o666)


def _by_group(file):
    file.chmod(0o664)


def _long(file):
    file.write_bytes(b"#" * (configfiles.FILE_LIMIT + 1))


def _directory(file):
    file.unlink()
    file.mkdir()


def _pipe(file):
    file.unlink()
    os.mkfifo(file, 0o644)


def _device(file):
    file.unlink()
    file.symlink_to("/dev/zero")


def _socket(file):
    file.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(file))


def _loop(file):
    file.unlink()
    file.symlink_to(file)


@pytest.mark.parametrize("where", ["etc/luksrotd.conf", "lib.d/a.conf"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_foreign, "belongs to uid 65534, not 0"),
        (_writable, "others can write it \\(mode 0666\\)"),
        (_by_group, "others can write it \\(mode 0664\\)"),
        (_long, "longer than 262144 bytes"),
        (_directory, "not a regular file"),
        (_pipe, "not a regular file"),
        (_device, "not a regular file"),
        (_socket, "No such device or address"),
        (_loop, "Too many levels of symbolic links"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused_with_the_reason(system, where, spoil, reason):
    file = system.put(where, "[Limits]\nJobs=1\n")
    assert system.read() == ["[Limits]\nJobs=1\n"]
    spoil(file)
    before = open_descriptors()
    with pytest.raises(ConfigError, match=rf"^cannot read the configuration: {file}: {reason}$"):
        system.read()
    assert open_descriptors() == before


def test_a_directory_that_cannot_be_listed_is_an_error(system):
    system.put("etc.d/a.conf").parent.rename(system.root / "aside")
    system.directories[2].write_text("")
    with pytest.raises(ConfigError, match=r"luksrotd\.conf\.d: Not a directory"):
        system.read()


def test_the_number_of_files_is_bounded(system):
    for number in range(configfiles.FILES_LIMIT):
        system.put(f"etc.d/{number:03}.conf", str(number))
    assert system.read() == [str(number) for number in range(configfiles.FILES_LIMIT)]
    system.put("lib.d/one-more.conf")
    with pytest.raises(ConfigError, match="more than 256 drop-ins"):
        system.read()
