# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's package: what it holds, what it depends on, what it does when it comes and goes."""

import re
import subprocess

import pytest

import luksrotd
from tests.installed.packages.conftest import run
from tests.packaging.places import ROOT, man_pages, placed, python_files

PYTHON = "usr/lib/python3/dist-packages"
METADATA = f"{PYTHON}/luksrotd-{luksrotd.__version__}.dist-info"
METADATA_FILES = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")
SCRIPTS = ("postinst", "prerm", "postrm")


@pytest.fixture(scope="module")
def tree(deb, tmp_path_factory):
    top = tmp_path_factory.mktemp("deb")
    run("dpkg-deb", "--raw-extract", deb, top)
    return top


@pytest.fixture(scope="module")
def fields(deb):
    shown = run("dpkg-deb", "--field", deb)
    return dict(re.findall(r"(?m)^(\S+): (.*)$", shown))


def relations(value):
    """Names of packages → what is said of their versions; of alternatives all."""
    found = re.findall(r"([a-z0-9][a-z0-9.+-]+)(?::any)?(?: \(([^)]*)\))?", value)
    return dict(found)


def test_every_file_is_at_its_place_and_none_besides(deb):
    listed = [line.split(None, 5) for line in run("dpkg-deb", "--contents", deb).splitlines()]
    modes = {name.removeprefix("./"): mode for mode, _, _, _, _, name in listed}
    assert {owner for _, owner, *_ in listed} == {"root/root"}
    assert {mode for name, mode in modes.items() if name.endswith("/") or not name} == {"drwxr-xr-x"}
    executable = {name for name, mode in modes.items() if mode == "-rwxr-xr-x"}
    plain = {name for name, mode in modes.items() if mode == "-rw-r--r--"}
    assert len(executable | plain) == sum(not name.endswith("/") and bool(name) for name in modes)
    assert executable == {"usr/bin/luksrotctl", "usr/bin/luksrotd"}
    expected = (
        placed().keys() | {f"{page}.gz" for page in man_pages()} | {f"{PYTHON}/{name}" for name in python_files()}
    )
    expected |= {f"{METADATA}/{name}" for name in METADATA_FILES}
    expected |= {f"usr/share/doc/luksrotd/{name}" for name in ("changelog.gz", "copyright")}
    compressed = {f"{name}.gz" for name in expected if f"{name}.gz" in plain}
    assert plain - compressed == expected - {name.removesuffix(".gz") for name in compressed}


def test_only_the_configuration_is_the_administrators(tree):
    assert (tree / "DEBIAN/conffiles").read_text().split() == ["/etc/luksrotd/luksrotd.conf"]


def test_one_package_serves_every_python_that_luksrotd_runs_on(fields):
    depends = relations(fields["Depends"])
    assert "python3 (>= 3.11~)" in fields["Depends"].split(", ")
    assert "<" not in depends["python3"]
    assert not any(name.startswith("python3.") for name in depends)
    assert fields["Architecture"] == run("dpkg", "--print-architecture").strip()


def test_it_depends_on_debians_own_packages(fields):
    depends = relations(fields["Depends"])
    named = {"dbus-next", "pyudev", "cffi", "systemd", "rich"}
    assert {f"python3-{name}" for name in named} <= depends.keys()
    assert {"libc6", "libcryptsetup12", "libseccomp2", "polkitd", "procps", "udev"} <= depends.keys()
    # The oldest is Debian 12's: what it links with must be no newer.
    assert depends["libcryptsetup12"] == ">= 2:2.6"


def test_the_extension_keeps_to_the_stable_abi(tree):
    extension = tree / PYTHON / "luksrotd/cryptsetup/_ffi.abi3.so"
    dynamic = run("readelf", "--dynamic", "--wide", extension)
    libraries = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert libraries == {"libc.so.6", "libcryptsetup.so.12", "libseccomp.so.2"}
    undefined = set(re.findall(r" UND (Py\w+|_Py\w+)", run("readelf", "--dyn-syms", "--wide", extension)))
    assert undefined
    # Of the names with an underscore these belong to it.
    assert {name for name in undefined if name.startswith("_Py")} <= {"_Py_Dealloc", "_Py_NoneStruct"}


def test_commands_are_run_by_debians_python(tree):
    for name in ("luksrotctl", "luksrotd"):
        assert (tree / "usr/bin" / name).read_text().startswith("#!/usr/bin/python3\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_maintainer_scripts_are_sound(tree, name):
    script = tree / "DEBIAN" / name
    assert script.stat().st_mode & 0o777 == 0o755
    assert script.read_text().startswith("#!/bin/sh\n")
    assert "set -e\n" in script.read_text()
    assert "#DEBHELPER#" not in script.read_text()
    run("shellcheck", "--severity=warning", script)


def test_no_script_but_those_and_none_before_it_is_unpacked(tree):
    assert {path.name for path in (tree / "DEBIAN").iterdir()} == {"conffiles", "control", "md5sums", *SCRIPTS}


def test_its_user_is_there_before_the_daemon_starts_and_reconcile_is_done(tree):
    text = (tree / "DEBIAN/postinst").read_text()
    order = [
        "systemd-sysusers ",
        "systemd-tmpfiles ",
        "enable 'luksrotd-reconcile.service'",
        "deb-systemd-invoke start 'luksrotd-reconcile.service'",
        "enable 'luksrotd.service'",
        "deb-systemd-invoke $_dh_action 'luksrotd.service'",
    ]
    places = [text.index(step) for step in order]
    assert places == sorted(places)
    # What reconcile did at boot is done; the daemon is restarted, not started, if it is there.
    assert "_dh_action=restart" in text
    assert text.count("restart") == 1


def test_the_daemon_runs_until_the_new_version_is_there(tree):
    """Stopped it is only on removal."""
    stops = re.findall(r"(?s)if (.{0,80}?); then\n[^\n]*deb-systemd-invoke stop", (tree / "DEBIAN/prerm").read_text())
    assert len(stops) == 3
    assert all('"$1" = remove' in condition for condition in stops)


def purge(tree, argument, root):
    """Run postrm on a system below ``root``."""
    script = re.sub(r" /(var|etc|run)/", rf" {root}/\1/", (tree / "DEBIAN/postrm").read_text())
    script = script.replace("/run/systemd/system", f"{root}/nowhere").replace("/usr/bin/deb-systemd-helper", "/nowhere")
    assert subprocess.run(["sh", "-c", script, "postrm", argument], check=False).returncode == 0


def test_purge_removes_what_luksrotd_has_kept_and_removal_does_not(tree, tmp_path):
    ours = [
        "var/lib/luksrotd/inventory",
        "etc/luksrotd/luksrotd.conf.d/own.conf",
        "etc/luksrotd/rotate/some.conf",
        "run/luksrotd/lock",
        "etc/systemd/system/timers.target.wants/luksrotd-rotate@vault.timer",
    ]
    others = ["var/lib/other/file", "etc/systemd/system/timers.target.wants/other.timer", "etc/crypttab"]
    for name in [*ours, *others]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    def there():
        return {name for name in [*ours, *others] if (tmp_path / name).exists()}

    purge(tree, "remove", tmp_path)
    assert there() == {*ours, *others}
    purge(tree, "purge", tmp_path)
    assert there() == set(others)
    assert not (tmp_path / "etc/luksrotd").exists()


def test_purge_leaves_what_may_be_the_only_copy_of_a_key(tree, tmp_path):
    """A sealed credential where luksrotd(8) puts it, an escrow's key."""
    kept = tmp_path / "etc/luksrotd/main-key.cred"
    kept.parent.mkdir(parents=True)
    kept.write_text("")
    purge(tree, "purge", tmp_path)
    assert kept.exists()


def test_lintian_has_nothing_to_say(deb):
    (changes,) = deb.parent.glob("*.changes")
    said = subprocess.run(
        ["lintian", "--fail-on=none", "--allow-root", changes], capture_output=True, text=True, check=True
    )
    assert (said.stdout, said.stderr) == ("", "")


def test_every_exception_from_lintian_says_why():
    path = ROOT / "packaging/debian/luksrotd.lintian-overrides"
    lines = path.read_text().splitlines() if path.exists() else []
    for before, line in zip(["", *lines], lines, strict=False):
        assert line.startswith("#") or before.startswith("#"), line
