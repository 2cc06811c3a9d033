# SPDX-License-Identifier: GPL-2.0-or-later
"""The files that systemd and the bus read, by the tools of systemd themselves."""

import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

from luksrotd import names
from luksrotd.ctl.exits import Exit
from luksrotd.daemon import EXIT_CONFIG
from luksrotd.host.notify import UDEV_SOCKET
from luksrotd.host.sources import TPM_DEVICE

ROOT = Path(__file__).resolve().parents[2]
DAEMON, BOOT, ONE = SERVICES = ("luksrotd.service", "luksrotd-reconcile.service", "luksrotd-reconcile@.service")
SOCKET = "luksrotd-udev.socket"
UNITS = (*SERVICES, SOCKET)

#: What `systemd-analyze security` may find at most, in tenths (0 is closed, 100 open).
EXPOSURE = 15

#: Settings that all services must have alike.
SANDBOX = re.compile(
    r"^(CapabilityBounding|NoNew|Device|Protect|Private|Restrict|IPAddress|Lock|Memory|SystemCall|Keyring|UMask|LimitCORE"
    r"|OOMPolicy|RuntimeDirectory|StateDirectory|ReadWrite|ReadOnly|Bind|KillMode)"
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
        (tmp_path / unit).write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", text), encoding="utf-8")
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


@pytest.mark.parametrize("unit", range(len(SERVICES)), ids=SERVICES)
def test_the_sandbox_stays_closed(units, unit):
    rated = run("systemd-analyze", "security", "--offline=yes", "--no-pager", f"--threshold={EXPOSURE}", units[unit])
    assert rated.returncode == 0, rated.stdout + rated.stderr


#: What each service has that the others have not, with what they have instead; anything else must be alike.
OWN = {
    # Tokens of callers, files of callers, udev.
    DAEMON: {
        "DeviceAllow": ["block-* rw", f"{TPM_DEVICE} rw"],
        "ProtectHome": ["read-only"],
        "RestrictAddressFamilies": ["AF_UNIX AF_NETLINK"],
    },
    # Block devices only.
    BOOT: {"DeviceAllow": ["block-* rw"], "ProtectHome": ["yes"], "RestrictAddressFamilies": ["AF_UNIX"]},
    # An image, too.
    ONE: {
        "DeviceAllow": ["block-* rw"],
        "ProtectHome": ["read-only"],
        "RestrictAddressFamilies": ["AF_UNIX"],
        "ReadWritePaths": ["-%f"],
    },
}


def test_all_services_have_the_same_sandbox():
    sandboxes = {}
    for unit in SERVICES:
        found = settings(unit)
        sandboxes[unit] = {name: found[name] for name in found if SANDBOX.match(name)}
        assert {name: sandboxes[unit].pop(name) for name in OWN[unit]} == OWN[unit]
    assert len(sandboxes[DAEMON]) > 25
    assert sandboxes[BOOT] == sandboxes[DAEMON]
    assert sandboxes[ONE] == sandboxes[DAEMON]


@pytest.mark.parametrize("unit", SERVICES)
def test_no_service_has_a_network(unit):
    found = settings(unit)
    assert found["PrivateNetwork"] == ["yes"]
    assert not {"AF_INET", "AF_INET6", "AF_PACKET"} & set(found["RestrictAddressFamilies"][0].split())


def test_the_socket_of_udev_comes_and_goes_with_the_daemon():
    socket = settings(SOCKET)
    assert settings(DAEMON)["Sockets"] == [SOCKET]
    assert socket["Service"] == socket["BindsTo"] == [DAEMON]
    assert socket["ListenNetlink"] == ["kobject-uevent 2"]
    assert socket["FileDescriptorName"] == [UDEV_SOCKET]
    assert socket["StartLimitIntervalSec"] == ["0"]  # else a service that may start again finds none
    assert socket["PassCredentials"] == ["yes"]


def test_units_name_the_bus_and_the_directories():
    daemon = settings(DAEMON)
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
    daemon = settings(DAEMON)
    assert daemon["ExecReload"] == ["kill -HUP $MAINPID"]
    assert daemon["RestartPreventExitStatus"] == [str(EXIT_CONFIG)]


def test_reconcile_comes_before_the_daemon_and_ends():
    reconcile = settings(BOOT)
    assert reconcile["Type"] == ["oneshot"]
    assert reconcile["Before"] == [DAEMON]
    assert reconcile["ExecStart"] == ["/usr/bin/luksrotctl --direct reconcile --all"]
    # A failure of settle does not count, and no command goes on for ever.
    assert reconcile["ExecStartPre"] == ["-udevadm settle --timeout=30"]
    assert reconcile["TimeoutStartSec"] == ["90s"]


@pytest.mark.parametrize("unit", [BOOT, ONE])
def test_a_volume_that_waits_for_a_person_is_no_failure_of_the_unit(unit):
    assert settings(unit)["SuccessExitStatus"] == [str(Exit.PERSON.value)]


def test_presets_name_units_that_there_are():
    lines = (ROOT / "systemd" / "90-luksrotd.preset").read_text(encoding="utf-8").splitlines()
    presets = dict(reversed(line.split()) for line in lines if line and not line.startswith("#"))
    assert presets[DAEMON] == presets[BOOT] == "enable"
    assert presets.pop("luksrotd-rotate@.timer") == "disable"
    assert all("Install" in (ROOT / "systemd" / unit).read_text(encoding="utf-8") for unit in presets)


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
