# SPDX-License-Identifier: GPL-2.0-or-later
"""apt upgrades the package, removes it and installs it again, on a machine that has it."""

import subprocess

import pytest

from luksrotd import names
from tests.beds import roots
from tests.beds.container import Container
from tests.beds.waiting import until
from tests.installed.conftest import FAST_KEYS, renewed
from tests.installed.container.actions import (
    apt,
    enroll,
    luksrotctl,
    main_pid,
    package_status,
    property_of,
    rotate,
)
from tests.installed.container.packages import later, version_of
from tests.support.daemon_process import BACKUP, NEW, OLD

DAEMON, RECONCILE = "luksrotd.service", "luksrotd-reconcile.service"
PACKAGE = "/packages/luksrotd.deb"
LATER = "/packages/later/luksrotd.deb"
QUIET = ("-o", "Dpkg::Use-Pty=0", "--quiet", "--yes")


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The package, and a later one."""
    package = roots.deb()
    return {PACKAGE: package, LATER: later(package, tmp_path_factory.mktemp("later"))}


@pytest.fixture
def machine(release, loop_volume, packages):
    """A machine that has the package, and at hand the same and a later one."""
    with Container(roots.installed(release), binds=packages, devices=[loop_volume.path], files=FAST_KEYS) as container:
        yield container


@pytest.fixture
def enrolled(machine, loop_volume):
    """The volume with the managed key ``BACKUP``."""
    disk = renewed(machine, loop_volume)
    enroll(machine, disk)
    return disk


def upgrade(machine, packages):
    """Install the later package; it is the one that runs then."""
    pid = main_pid(machine)
    apt(machine, "install", LATER)
    assert machine.run("dpkg-query", "--show", "--showformat=${Version}", "luksrotd").stdout == version_of(
        packages[LATER]
    )
    assert main_pid(machine) not in (0, pid)
    assert machine.run("systemctl", "is-active", DAEMON).stdout == "active\n"
    assert machine.run("systemctl", "--failed", "--no-legend").stdout == ""


def test_an_upgrade_keeps_what_was_staged_and_configured(machine, enrolled, packages):
    machine.put("/root/new.key", NEW.decode(), mode=0o600)
    luksrotctl(machine, "stage", enrolled.node, "--key-file=/root/old.key", "--new-keyfile=/root/new.key")
    machine.run("sed", "-i", "s/^#Jobs=4/Jobs=3/", "/etc/luksrotd/luksrotd.conf")
    known = machine.run("find", "/var/lib/luksrotd", "-type", "f").stdout
    assert known
    upgrade(machine, packages)
    assert machine.run("grep", "^Jobs", "/etc/luksrotd/luksrotd.conf").stdout == "Jobs=3\n"
    assert machine.run("find", "/var/lib/luksrotd", "-type", "f").stdout == known
    assert [enrolled.opens(secret) for secret in (OLD, BACKUP, NEW)] == [True, True, True]
    luksrotctl(machine, "finish", enrolled.node)
    assert [enrolled.opens(secret) for secret in (OLD, BACKUP, NEW)] == [True, False, True]


def test_an_upgrade_while_a_key_is_derived_loses_nothing(machine, enrolled, packages):
    """The derivation, of a minute or more, is given up: nothing has been written for it."""
    machine.put("/root/new.key", NEW.decode(), mode=0o600)
    costly = ("--pbkdf=pbkdf2", "--pbkdf-force-iterations=200000000")
    arguments = (enrolled.node, "--key-file=/root/backup.key", "--new-keyfile=/root/new.key", *costly)
    before = enrolled.headers()
    with machine.popen("luksrotctl", "rotate", *arguments, stderr=subprocess.PIPE) as client:
        until(lambda: property_of(machine, enrolled.path, names.DEVICE_INTERFACE, "Busy"), "the rotation works")
        upgrade(machine, packages)
        assert client.wait() != 0
    assert enrolled.headers() == before
    assert [enrolled.opens(secret) for secret in (OLD, BACKUP)] == [True, True]
    assert luksrotctl(machine, "--direct", "reconcile", enrolled.node).endswith("clean\n")


def test_removed_it_leaves_a_volume_to_stock_tools_and_comes_back(machine, enrolled, loop_volume):
    apt(machine, "remove", "luksrotd")
    assert package_status(machine) == "config-files"
    assert machine.run("systemctl", "is-active", DAEMON, check=False).stdout == "inactive\n"
    assert machine.run("systemctl", "--failed", "--no-legend").stdout == ""
    # The volume, by the cryptsetup of that machine: open, add, kill, and our token is no hindrance.
    node = str(loop_volume.path)
    for key in ("old", "backup"):
        machine.run("cryptsetup", "open", "--test-passphrase", f"--key-file=/root/{key}.key", node)
    fast = ("--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000")
    machine.put("/root/new.key", NEW.decode(), mode=0o600)
    machine.run("cryptsetup", "luksAddKey", *fast, "--key-file=/root/backup.key", node, "/root/new.key")
    ((_, keyslot),) = enrolled.pairs()
    machine.run("cryptsetup", "luksKillSlot", "--batch-mode", "--key-file=/root/new.key", node, str(keyslot))
    assert [enrolled.opens(secret) for secret in (OLD, BACKUP, NEW)] == [True, False, True]

    apt(machine, "install", PACKAGE)
    assert package_status(machine) == "installed"
    for unit in (DAEMON, RECONCILE):
        assert machine.run("systemctl", "is-enabled", unit).stdout == "enabled\n"
    until(lambda: str(loop_volume.path) in luksrotctl(machine, "list"), "it manages the volume again")


def test_a_rotation_that_a_removal_meets_is_not_torn(machine, enrolled):
    rotate(machine, enrolled)
    apt(machine, "remove", "luksrotd")
    opens = [enrolled.opens(secret) for secret in (OLD, BACKUP, NEW)]
    assert opens in ([True, True, False], [True, False, True])
    assert len(enrolled.pairs()) == 1
