# SPDX-License-Identifier: GPL-2.0-or-later
"""The RPM and Arch's package, as they can be built on Debian: with Debian's folders of Python packages."""

import io
import re
import tarfile

import pytest

import luksrotd
from tests.installed.packages.conftest import only, run
from tests.packaging.places import ROOT, man_pages, placed, python_files

PYTHON = "usr/lib/python3/dist-packages"
METADATA = f"{PYTHON}/luksrotd-{luksrotd.__version__}.dist-info/"
OUTSIDE = {"usr/bin/luksrotctl", "usr/bin/luksrotd"}
DOCUMENTS = {f"usr/share/doc/luksrotd/{name}" for name in ("CHANGELOG.md", "README.md")}
DOCUMENTS |= {"usr/share/licenses/luksrotd/LICENSE"}


def expected(pages):
    """What either package has, but for the metadata of the Python package."""
    moved = {name.replace("zsh/vendor-completions", "zsh/site-functions") for name in placed()}
    return moved | pages | OUTSIDE | DOCUMENTS | {f"{PYTHON}/{name}" for name in python_files()}


def plain(names):
    """Without what Python's installers add, each in its way: metadata, compiled code, type stubs."""
    return {name for name in names if not name.startswith(METADATA) and not name.endswith((".pyc", ".pyi"))}


# -- RPM ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files():
    """Of the RPM: path → mode, owner, flags; without the build ids, which rpm adds."""
    listed = run(
        *("rpm", "--query", "--package", only("build/rpm/luksrotd-*.rpm"), "--queryformat"),
        r"[%{FILENAMES}\t%{FILEMODES:perms}\t%{FILEUSERNAME}:%{FILEGROUPNAME}\t%{FILEFLAGS:fflags}\n]",
    )
    rows = [line.split("\t") for line in listed.splitlines()]
    return {
        path.removeprefix("/"): (mode, owner, flags) for path, mode, owner, flags in rows if "/.build-id" not in path
    }


def test_the_rpm_has_every_file_and_none_besides(files):
    assert plain(path for path, (mode, _, _) in files.items() if mode[0] == "-") == expected(man_pages())
    assert {owner for _, owner, _ in files.values()} == {"root:root"}
    executable = OUTSIDE | {f"{PYTHON}/luksrotd/cryptsetup/_ffi.abi3.so"}
    assert {path: mode for path, (mode, _, _) in files.items() if path in executable} == dict.fromkeys(
        executable, "-rwxr-xr-x"
    )
    others = {mode for path, (mode, _, _) in files.items() if path not in executable}
    assert others == {"-rw-r--r--", "drwxr-xr-x"}


def test_the_rpm_owns_the_folders_that_are_its_own(files):
    folders = {path for path, (mode, _, _) in files.items() if mode[0] == "d"}
    assert {"etc/luksrotd", "usr/share/doc/luksrotd/examples", f"{PYTHON}/luksrotd"} <= folders
    assert all("luksrotd" in folder for folder in folders)


def test_the_rpm_never_writes_over_the_configuration(files):
    assert [path for path, (_, _, flags) in files.items() if "c" in flags and "n" in flags] == [
        "etc/luksrotd/luksrotd.conf"
    ]


# -- Arch --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive():
    with tarfile.open(only("build/arch/luksrotd-*.pkg.tar.gz")) as archive:
        yield archive


def test_archs_package_has_every_file_and_none_besides(archive):
    names = {member.name for member in archive if not member.isdir()}
    assert {name for name in names if name.startswith(".")} == {".BUILDINFO", ".INSTALL", ".MTREE", ".PKGINFO"}
    pages = {f"{page}.gz" for page in man_pages()}
    assert plain(name for name in names if name[0] != ".") == expected(pages)
    assert {(member.uid, member.gid) for member in archive} == {(0, 0)}
    assert not [member.name for member in archive if member.mode & 0o022]


def test_archs_package_keeps_the_configuration(archive):
    info = archive.extractfile(".PKGINFO").read().decode()
    assert re.findall(r"(?m)^backup = (.*)$", info) == ["etc/luksrotd/luksrotd.conf"]


def test_archs_script_can_be_read(archive):
    script = io.TextIOWrapper(archive.extractfile(".INSTALL")).read()
    assert script == (ROOT / "packaging/arch/luksrotd.install").read_text()


@pytest.mark.parametrize("name", ["PKGBUILD", "luksrotd.install"])
def test_archs_scripts_are_sound(name):
    run("shellcheck", "--severity=warning", ROOT / "packaging/arch" / name)


def test_our_own_scripts_are_sound():
    found = [path for path in (ROOT / "packaging").iterdir() if path.is_file() and path.read_bytes()[:2] == b"#!"]
    scripts = [path for path in found if b"sh\n" in path.read_bytes().split(b"\n", 1)[0] + b"\n"]
    assert len(scripts) >= 6
    run("shellcheck", *scripts)
