# SPDX-License-Identifier: GPL-2.0-or-later
"""The files that systemd and the bus read, by the tools of systemd themselves."""

import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

from luksrotd import names
from luksrotd.daemon import EXIT_CONFIG
from luksrotd.host.sources import TPM_DEVICE

ROOT = Path(__file__).resolve().parents[2]
UNITS = ("luksrotd.service", "luksrotd-reconcile.service")

#: What `systemd-analyze security` may find at most, in tenths (0 is closed, 100 open).
EXPOSURE = 25

#: Settings that both units must have alike.
SANDBOX = re.compile(
    r"^(CapabilityBounding|NoNew|Device|Protect|Private|Restrict|IPAddress|Lock|Memory|SystemCall|Keyring|UMask|LimitCORE"
    r"|OOMPolicy|RuntimeDirectory|StateDirectory)"
)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def settings(unit: str) -> dict[str, list[str]]:
    """Every setting of a unit file, with its values in order."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "systemd" / unit).read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            name, value = line.split("=", 1)
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture
def units(tmp_path):
    """Copies of the units whose programs exist."""
    for unit in UNITS:
        text = (ROOT / "systemd" / unit).read_text(encoding="utf-8")
        (tmp_path / unit).write_text(re.sub(r"(?m)^ExecStart=.*", "ExecStart=/bin/true", text), encoding="utf-8")
    return [tmp_path / unit for unit in UNITS]


def test_systemd_understands_every_line_of_the_units(units):
    verified = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *units)
    complaints = [line for line in verified.stderr.splitlines() if "luksrotd" in line]
    assert (verified.returncode, complaints) == (0, [])


def test_verify_would_complain(units):
    """Else the test above proves nothing."""
    units[0].write_text(units[0].read_text(encoding="utf-8") + "\n[Service]\nWatchdogSecs=1\n", encoding="utf-8")
    verified = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", units[0])
    assert "WatchdogSecs" in verified.stderr


@pytest.mark.parametrize("unit", range(len(UNITS)), ids=UNITS)
def test_the_sandbox_stays_closed(units, unit):
    rated = run("systemd-analyze", "security", "--offline=yes", "--no-pager", f"--threshold={EXPOSURE}", units[unit])
    assert rated.returncode == 0, rated.stdout + rated.stderr


def test_both_units_have_the_same_sandbox():
    daemon, reconcile = map(settings, UNITS)
    common = {name for name in daemon.keys() | reconcile.keys() if SANDBOX.match(name)}
    assert len(common) > 20
    # Reconcile needs no secret.
    assert daemon["DeviceAllow"].pop() == f"{TPM_DEVICE} rw"
    assert {name: daemon.get(name) for name in common} == {name: reconcile.get(name) for name in common}


def test_units_name_the_bus_and_the_directories():
    daemon = settings("luksrotd.service")
    assert daemon["Type"] == ["notify"]
    assert daemon["BusName"] == [names.BUS_NAME]
    assert daemon["ExecStart"] == ["/usr/bin/luksrotd"]
    directories = [f"/run/{name}" for name in daemon["RuntimeDirectory"][0].split()]
    assert directories == [names.RUNTIME_DIRECTORY, names.CRYPTSETUP_LOCK_DIRECTORY]
    assert daemon["RuntimeDirectoryPreserve"] == ["yes"]
    assert [f"/var/lib/{name}" for name in daemon["StateDirectory"]] == [names.STATE_DIRECTORY]
    assert daemon["StateDirectoryMode"] == ["0700"]
    assert [f"/etc/{name}/luksrotd.conf" for name in daemon["ConfigurationDirectory"]] == [names.CONFIG_FILE]
    assert [f"/etc/{name}/luksrotd.conf.d" for name in daemon["ConfigurationDirectory"]] == [
        names.CONFIG_DIRECTORIES[-1]
    ]


def test_a_reload_is_a_hangup_and_a_bad_configuration_is_not_tried_again():
    daemon = settings("luksrotd.service")
    assert daemon["ExecReload"] == ["kill -HUP $MAINPID"]
    assert daemon["RestartPreventExitStatus"] == [str(EXIT_CONFIG)]


def test_reconcile_comes_before_the_daemon_and_ends():
    reconcile = settings("luksrotd-reconcile.service")
    assert reconcile["Type"] == ["oneshot"]
    assert reconcile["Before"] == ["luksrotd.service"]
    assert reconcile["ExecStart"] == ["/usr/bin/luksrotctl --direct reconcile --all"]
    assert reconcile["TimeoutStartSec"] != ["infinity"]


def test_bus_activation_starts_the_unit():
    path = ROOT / "dbus" / f"{names.BUS_NAME}.service"
    parser = ConfigParser(interpolation=None)
    parser.optionxform = str
    parser.read(path, encoding="utf-8")
    assert dict(parser["D-BUS Service"]) == {
        "Name": names.BUS_NAME,
        "Exec": "/bin/false",
        "User": "root",
        "SystemdService": "luksrotd.service",
    }
    assert (ROOT / "systemd" / "luksrotd.service").exists()


def test_sysusers_makes_the_worker_user(tmp_path):
    (tmp_path / "etc").mkdir()
    made = run("systemd-sysusers", f"--root={tmp_path}", ROOT / "systemd" / "luksrotd.sysusers")
    assert made.returncode == 0, made.stderr
    users = [line.split(":") for line in (tmp_path / "etc/passwd").read_text(encoding="utf-8").splitlines()]
    assert [user[0] for user in users] == [names.WORKER_USER]
    assert users[0][6].endswith("nologin")
    assert int(users[0][2]) > 0


def test_tmpfiles_makes_the_lock_directory(tmp_path):
    made = run("systemd-tmpfiles", "--create", f"--root={tmp_path}", ROOT / "systemd" / "luksrotd.tmpfiles")
    assert made.returncode == 0, made.stderr
    directory = tmp_path / names.RUNTIME_DIRECTORY.removeprefix("/")
    assert directory.is_dir()
    assert directory.stat().st_mode & 0o7777 == 0o700


MAN_PAGES = sorted((ROOT / "docs" / "man").glob("*.scd"))


@pytest.mark.parametrize("page", MAN_PAGES, ids=lambda page: page.stem)
def test_man_pages_can_be_built(page):
    built = subprocess.run(["scdoc"], input=page.read_bytes(), capture_output=True, check=True)
    name, section = page.stem.rsplit(".", 1)
    assert f'.TH "{name}" "{section}"'.encode() in built.stdout


@pytest.mark.parametrize("unit", UNITS)
def test_units_refer_to_man_pages_that_there_are(unit):
    text = (ROOT / "systemd" / unit).read_text()
    named = re.findall(r"man:(\w+)\((\d)\)", text)
    assert named
    assert {f"{name}.{section}" for name, section in named} <= {page.stem for page in MAN_PAGES}
