# SPDX-License-Identifier: GPL-2.0-or-later
"""What the packages say of themselves, held against the tree and against each other."""

import re
import subprocess
import tomllib

import pytest

import luksrotd
from tests.packaging.places import ROOT

DEBIAN = ROOT / "packaging/debian"
CONTROL = (DEBIAN / "control").read_text()
RULES = (DEBIAN / "rules").read_text()
SPEC = (ROOT / "packaging/rpm/luksrotd.spec").read_text()
SECCOMP = (ROOT / "luksrotd/cryptsetup/seccomp.py").read_text()
PKGBUILD = (ROOT / "packaging/arch/PKGBUILD").read_text()
#: Name at PyPI → what Debian's and Arch's packages are called after "python3-" and "python-", where that is another.
RENAMED = {"systemd-python": "systemd"}


def dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plain = [re.split(r"[<>=~! ]", line)[0] for line in project["dependencies"]]
    return {RENAMED.get(name, name) for name in plain}


def test_all_have_the_version_of_the_code():
    (changelog,) = re.findall(r"\Aluksrotd \((.*?)\)", (DEBIAN / "changelog").read_text())
    (spec,) = re.findall(r"(?m)^Version: *(\S+)$", SPEC)
    (entry, *_) = re.findall(r"(?m)^%changelog\n.* - (\S+)-\d+$", SPEC)
    (pkgbuild,) = re.findall(r"(?m)^pkgver=(\S+)$", PKGBUILD)
    assert {changelog, spec, entry, pkgbuild} == {luksrotd.__version__}


def test_none_is_for_a_machine_on_which_the_worker_refuses_to_run():
    (debian,) = re.findall(r"(?m)^Architecture: (.*)$", CONTROL)
    (excluded,) = re.findall(r"(?m)^ExcludeArch: *(.*)$", SPEC)
    (arch,) = re.findall(r"(?m)^arch=\((.*)\)$", PKGBUILD)
    refused = {name.removeprefix("SCMP_ARCH_").lower() for name in re.findall(r"lib\.(SCMP_ARCH_\w+)", SECCOMP)}
    assert refused == {"s390", "s390x", "x86"}
    assert not {"i386", "s390x", "any", "linux-any"} & set(debian.split())
    assert excluded.split() == ["%{ix86}", "s390x"]
    assert arch == "x86_64"


def test_all_have_one_summary():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (debian,) = re.findall(r"(?m)^Description: (.*)$", CONTROL)
    (spec,) = re.findall(r"(?m)^Summary: *(.*)$", SPEC)
    (pkgbuild,) = re.findall(r"(?m)^pkgdesc='(.*)'$", PKGBUILD)
    assert {spec, pkgbuild, debian[0].upper() + debian[1:]} == {project["description"]}


def field(name):
    (value,) = re.findall(rf"(?m)^{name}:\n((?: .*\n)+)", CONTROL)
    return {re.split(r"[ (<]", line.strip(" ,"))[0] for line in value.splitlines()}


def test_debian_depends_on_all_that_the_code_imports():
    assert {f"python3-{name}" for name in dependencies()} <= field("Depends")


def test_arch_depends_on_all_that_the_code_imports():
    (value,) = re.findall(r"(?m)^depends=\(([^)]*)\)", PKGBUILD)
    assert {f"python-{name}" for name in dependencies()} <= set(value.split())


def enabled():
    """The units that an administrator, or a preset, enables, but for templates."""
    units = [
        *(ROOT / "systemd").glob("*.service"),
        *(ROOT / "systemd").glob("*.socket"),
        *(ROOT / "systemd").glob("*.timer"),
    ]
    return {unit.name for unit in units if "@" not in unit.name and "\n[Install]\n" in unit.read_text()}


def test_all_look_after_all_units_that_are_enabled():
    assert set(re.findall(r"(?m)^\tdh_installsystemd.* (\S+)$", RULES)) == enabled()
    for scriptlet in ("post", "preun"):
        (line,) = re.findall(rf"(?m)^%systemd_{scriptlet} (.*)$", SPEC)
        assert set(line.split()) == enabled(), scriptlet
    (line,) = re.findall(r"disable --now (.*)", (ROOT / "packaging/arch/luksrotd.install").read_text())
    assert set(line.split()) == enabled()


@pytest.mark.parametrize("path", [DEBIAN / "luksrotd.prerm", ROOT / "packaging/arch/luksrotd.install", None], ids=str)
def test_no_instance_outlives_the_package(path):
    templates = {unit.name.replace("@.", "@*.") for unit in (ROOT / "systemd").glob("*@.*")}
    (line,) = re.findall(r"(?:invoke|systemctl) stop (.*)", path.read_text() if path else SPEC)
    assert set(re.findall(r"'(\S+)'", line)) >= templates


def scripts():
    """What in packaging/ a shell reads."""
    found = [path for path in (ROOT / "packaging").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    shells = (b"#!/bin/sh\n", b"#!/bin/bash\n")
    named = {"PKGBUILD", "luksrotd.install"}
    return sorted(path for path in found if path.name in named or path.read_bytes().startswith(shells))


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_every_script_can_be_read_by_its_shell(path):
    shell = "sh" if path.read_bytes().startswith(b"#!/bin/sh\n") else "bash"
    assert subprocess.run([shell, "-n", path], check=False).returncode == 0
