# SPDX-License-Identifier: GPL-2.0-or-later
"""A fresh Debian, on which a person does what README.md says, literally; what is there then, and after a purge."""

import json
import re

import pytest

from luksrotd import names
from tests.beds import roots
from tests.beds.container import PROJECT, Container
from tests.beds.waiting import until
from tests.installed.conftest import anew
from tests.installed.container.actions import apt, luksrotctl, main_pid, package_status
from tests.support.daemon_process import OLD

DAEMON, RECONCILE = "luksrotd.service", "luksrotd-reconcile.service"
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def block(heading):
    """The first shell block under a heading of README.md."""
    return re.search(rf"^## {heading}\n.*?^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[1]


def do(container, script, answers=""):
    """Have it done in root's home, until something fails; what was printed."""
    container.put("/tmp/script", script)
    return container.run("sh", "-c", "cd /root && exec bash -e /tmp/script", input=answers).stdout


@pytest.fixture(scope="module")
def fresh(release, loop_volume):
    """Debian as it comes, without network, on which the package is then installed as README says."""
    package = roots.deb()
    with Container(
        roots.base(release), binds={f"/root/{package.name}": package}, devices=[loop_volume.path]
    ) as container:
        assert package_status(container) == "not-installed"
        do(container, block("Install"), "y\n")
        yield container


@pytest.fixture(scope="module")
def disk(fresh, loop_volume):
    """The volume as a new one, by the name that README knows it by."""
    fresh.run("ln", "-s", str(loop_volume.path), "/dev/sda2")
    fresh.put("/root/sda2.key", OLD.decode(), mode=0o600)
    return anew(loop_volume)


def test_it_is_installed_and_everything_runs(fresh):
    assert package_status(fresh) == "installed"
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


def test_the_first_lines_of_readme_work_as_printed(fresh, disk):
    until(lambda: disk.uuid in luksrotctl(fresh, "list"), "the daemon has seen that the volume is a new one")
    printed = do(fresh, block("Quick start"))
    assert disk.uuid in printed
    first, second, third = (f"/root/backup-{number}.key" for number in (1, 2, 3))
    secrets = [fresh.run("base64", path).stdout for path in (first, second, third)]
    assert len(set(secrets)) == 3
    opens = [
        fresh.run("cryptsetup", "open", "--test-passphrase", "--key-file", path, "/dev/sda2", check=False).returncode
        == 0
        for path in ("/root/sda2.key", first, second, third)
    ]
    assert opens == [True, False, False, True]
    ((name, _),) = disk.pairs()
    assert name == "backup"
    assert '"vault/43"' in json.dumps(disk.metadata()["tokens"])
    assert luksrotctl(fresh, "reconcile", "/dev/sda2").endswith("clean\n")


def test_it_is_there_after_a_reboot(fresh):
    fresh.reboot()
    assert fresh.run("systemctl", "is-system-running").stdout == "running\n"
    assert main_pid(fresh)


def test_purged_it_leaves_nothing_but_the_user(fresh):
    apt(fresh, "purge", "--autoremove", "luksrotd")
    assert package_status(fresh) == "not-installed"
    found = fresh.run("find", "/", "-xdev", "-name", "*luksrotd*", "-not", "-name", "*.deb").stdout.split()
    assert [path for path in found if not path.startswith("/var/log/")] == []
    mentions = fresh.run("grep", "--recursive", "--files-with-matches", "luksrotd", "/etc", check=False).stdout.split()
    assert {mention.rstrip("-") for mention in mentions} <= {"/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow"}
    assert fresh.run("systemctl", "is-active", DAEMON, check=False).stdout == "inactive\n"
    assert fresh.run("systemctl", "--failed", "--no-legend").stdout == ""
