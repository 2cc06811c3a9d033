# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``packaging/install`` makes: every file at its place, under the names that the code knows."""

import re
import subprocess
from configparser import ConfigParser
from xml.etree import ElementTree

import pytest

from luksrotd import names
from tests.packaging.places import ROOT, man_pages, placed, sources


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    top = tmp_path_factory.mktemp("tree")
    # Not what the caller's mask says.
    subprocess.run(["sh", "-c", 'umask 077; exec packaging/install "$0"', top], cwd=ROOT, check=True)
    return top


def files(top):
    return {str(path.relative_to(top)) for path in top.rglob("*") if not path.is_dir()}


def test_every_file_is_at_its_place_and_none_besides(tree):
    assert files(tree) == placed().keys() | man_pages()


def test_every_file_of_the_tree_has_a_place():
    assert set(placed().values()) == sources()


def test_files_are_copies(tree):
    assert [name for name, source in placed().items() if (tree / name).read_bytes() != source.read_bytes()] == []


def test_everybody_may_read_and_nobody_but_the_owner_may_write(tree):
    modes = {path.relative_to(tree): path.stat().st_mode & 0o7777 for path in tree.rglob("*")}
    assert {
        path: oct(mode) for path, mode in modes.items() if mode != (0o755 if (tree / path).is_dir() else 0o644)
    } == {}


def test_the_folder_of_completions_for_zsh_can_be_another(tmp_path):
    subprocess.run(
        ["packaging/install", tmp_path],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "ZSHDIR": "/usr/share/elsewhere"},
        check=True,
    )
    elsewhere = {name.replace("usr/share/zsh/vendor-completions", "usr/share/elsewhere") for name in placed()}
    assert files(tmp_path) == elsewhere | man_pages()


def test_it_wants_to_know_where(tmp_path):
    assert subprocess.run([ROOT / "packaging/install"], stderr=subprocess.DEVNULL, check=False).returncode == 2


# -- names -------------------------------------------------------------------------------------------------------


def names_in(tree, folder):
    return {path.name for path in (tree / folder).iterdir()}


def test_the_bus_finds_its_files_by_the_name_on_the_bus(tree):
    assert names_in(tree, "usr/share/dbus-1/system.d") == {f"{names.BUS_NAME}.conf"}
    assert names_in(tree, "usr/share/dbus-1/system-services") == {f"{names.BUS_NAME}.service"}
    assert names_in(tree, "usr/share/dbus-1/interfaces") == {f"{interface}.xml" for interface in names.INTERFACES}
    assert names_in(tree, "usr/share/polkit-1/actions") == {f"{names.BUS_NAME}.policy"}
    assert f"{names.BUS_NAME}.rules.example" in names_in(tree, "usr/share/doc/luksrotd/examples")


def test_each_file_of_an_interface_describes_it(tree):
    for interface in names.INTERFACES:
        node = ElementTree.parse(tree / f"usr/share/dbus-1/interfaces/{interface}.xml").getroot()
        assert [item.get("name") for item in node.iter("interface")] == [interface]


def test_activation_starts_the_unit_that_owns_the_name(tree):
    def section(path, name):
        parser = ConfigParser(strict=False, interpolation=None, comment_prefixes="#", delimiters="=")
        parser.optionxform = str
        parser.read(tree / path)
        return parser[name]

    service = section(f"usr/share/dbus-1/system-services/{names.BUS_NAME}.service", "D-BUS Service")
    assert service["Name"] == names.BUS_NAME
    unit = section(f"usr/lib/systemd/system/{service['SystemdService']}", "Service")
    assert unit["BusName"] == names.BUS_NAME
    assert unit["StateDirectory"].split()[0] == names.STATE_DIRECTORY.removeprefix("/var/lib/")
    assert f"/run/{unit['RuntimeDirectory'].split()[0]}" == names.RUNTIME_DIRECTORY
    assert f"/etc/{unit['ConfigurationDirectory']}/luksrotd.conf" == names.CONFIG_FILE


def test_user_directories_and_configuration_have_their_names(tree):
    (user,) = re.findall(r"(?m)^u (\S+)", (tree / "usr/lib/sysusers.d/luksrotd.conf").read_text())
    assert user == names.WORKER_USER
    (folder,) = re.findall(r"(?m)^d (\S+)", (tree / "usr/lib/tmpfiles.d/luksrotd.conf").read_text())
    assert folder == names.RUNTIME_DIRECTORY
    assert (tree / names.CONFIG_FILE.removeprefix("/")).is_file()


def test_the_documentation_that_units_name_is_installed(tree):
    pages = set()
    for unit in (tree / "usr/lib/systemd/system").iterdir():
        lines = re.findall(r"(?m)^Documentation=(.*)", unit.read_text())
        assert lines, unit.name
        pages |= {page for line in lines for page in re.findall(r"man:((?:luksrot|org\.luksrotd1)\S*)\((\d)\)", line)}
    assert pages
    assert {f"usr/share/man/man{number}/{name}.{number}" for name, number in pages} <= files(tree)
