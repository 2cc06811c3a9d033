# SPDX-License-Identifier: GPL-2.0-or-later
"""apt installs the package on a fresh Debian, upgrades it, removes it and purges it."""

import subprocess

import pytest

from luksrotd import names
from tests.beds import roots
from tests.beds.container import PROJECT, Container
from tests.beds.waiting import until
from tests.installed.conftest import FAST_KEYS, renewed
from tests.installed.container.actions import enroll, luksrotctl, main_pid, property_of, rotate
from tests.installed.container.packages import later, version_of
from tests.support.daemon_process import BACKUP, NEW, OLD

DAEMON, RECONCILE = "luksrotd.service", "luksrotd-reconcile.service"
PACKAGE = "/packages/luksrotd.deb"
LATER = "/packages/later/luksrotd.deb"
QUIET = ("-o", "Dpkg::Use-Pty=0", "--quiet", "--yes")


def apt(container, *arguments):
    return container.run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", *QUIET, *arguments).stdout


def status(container):
    """What dpkg thinks of the package: ``installed``, ``config-files`` or ``not-installed``."""
    query = ("dpkg-query", "--show", "--showformat=${db:Status-Status}", "luksrotd")
    return container.run(*query, check=False).stdout or "not-installed"


# -- on a fresh machine ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh(release, loop_volume):
    """Debian as it comes, without network, on which the package is then installed."""
    binds = {PACKAGE: roots.deb()}
    with Container(roots.base(release), binds=binds, devices=[loop_volume.path]) as container:
        assert status(container) == "not-installed"
        apt(container, "install", PACKAGE)
        yield container


def test_it_is_installed_and_everything_runs(fresh):
    assert status(fresh) == "installed"
    assert fresh.run("dpkg", "--audit").stdout == ""
    for unit in (DAEMON, RECONCILE):
        assert fresh.run("systemctl", "is-enabled", unit).stdout == "enabled\n"
        assert fresh.run("systemctl", "is-active", unit).stdout == "active\n"
    assert fresh.run("systemctl", "--failed", "--no-legend").stdout == ""
    assert fresh.run("busctl", "status", names.BUS_NAME).returncode == 0


def test_the_worker_has_its_user(fresh):
    _, _, uid, _, _, home, shell = fresh.run("getent", "passwd", names.WORKER_USER).stdout.strip().split(":")
    assert 0 < int(uid) < 1000
    assert (home, shell) == ("/", "/usr/sbin/nologin")


def test_the_volume_that_was_there_is_managed_at_once(fresh, loop_volume):
    assert str(loop_volume.path) in luksrotctl(fresh, "list")


def test_the_journal_can_explain_our_entries(fresh):
    for message_id in names.MessageId:
        assert "Defined-By: luksrotd" in fresh.run("journalctl", "--dump-catalog", message_id).stdout


def test_polkit_knows_the_actions(fresh):
    shown = fresh.run("pkaction").stdout.split()
    assert set(names.ACTIONS) <= set(shown)


def test_man_pages_and_completions_are_where_the_tools_look(fresh):
    pages = {f"/usr/share/man/man{path.stem[-1]}/{path.stem}.gz" for path in (PROJECT / "docs/man").glob("*.scd")}
    files = set(fresh.run("dpkg", "--listfiles", "luksrotd").stdout.split())
    assert pages
    assert pages <= files
    assert {
        "/usr/share/bash-completion/completions/luksrotctl",
        "/usr/share/zsh/vendor-completions/_luksrotctl",
        "/usr/share/fish/vendor_completions.d/luksrotctl.fish",
    } <= files
    for page in pages:
        assert fresh.run("zcat", page).stdout.count(".TH") == 1


def test_every_file_is_as_it_was_packed(fresh):
    assert fresh.run("dpkg", "--verify", "luksrotd").stdout == ""


def test_only_the_configuration_is_in_etc(fresh):
    files = fresh.run("dpkg", "--listfiles", "luksrotd").stdout.split()
    assert [file for file in files if file.startswith("/etc/")] == ["/etc/luksrotd", "/etc/luksrotd/luksrotd.conf"]
    assert fresh.run("dpkg-query", "--show", "--showformat=${Conffiles}", "luksrotd").stdout.split()[0] == (
        "/etc/luksrotd/luksrotd.conf"
    )


def test_it_is_there_after_a_reboot(fresh):
    fresh.reboot()
    assert fresh.run("systemctl", "is-system-running").stdout == "running\n"
    assert main_pid(fresh)


def test_purged_it_leaves_nothing_but_the_user(fresh):
    apt(fresh, "purge", "--autoremove", "luksrotd")
    assert status(fresh) == "not-installed"
    found = fresh.run("find", "/", "-xdev", "-name", "*luksrotd*", "-not", "-path", "/packages*").stdout.split()
    assert [path for path in found if not path.startswith("/var/log/")] == []
    mentions = fresh.run("grep", "--recursive", "--files-with-matches", "luksrotd", "/etc", check=False).stdout.split()
    assert {mention.rstrip("-") for mention in mentions} <= {"/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow"}
    assert fresh.run("systemctl", "is-active", DAEMON, check=False).stdout == "inactive\n"
    assert fresh.run("systemctl", "--failed", "--no-legend").stdout == ""


# -- on a machine that has it ------------------------------------------------------------------------------------------


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
    assert status(machine) == "config-files"
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
    assert status(machine) == "installed"
    for unit in (DAEMON, RECONCILE):
        assert machine.run("systemctl", "is-enabled", unit).stdout == "enabled\n"
    until(lambda: str(loop_volume.path) in luksrotctl(machine, "list"), "it manages the volume again")


def test_a_rotation_that_a_removal_meets_is_not_torn(machine, enrolled):
    rotate(machine, enrolled)
    apt(machine, "remove", "luksrotd")
    opens = [enrolled.opens(secret) for secret in (OLD, BACKUP, NEW)]
    assert opens in ([True, True, False], [True, False, True])
    assert len(enrolled.pairs()) == 1
