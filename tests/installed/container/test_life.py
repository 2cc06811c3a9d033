# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of the service under systemd: boot, watchdog, crash, reload, stop and reboot."""

import json

import pytest

from tests.beds import roots
from tests.beds.container import PROJECT, Container
from tests.beds.waiting import until
from tests.installed.conftest import FAST_KEYS, renewed
from tests.installed.container.actions import (
    active_again,
    enroll,
    luksrotctl,
    main_pid,
    property_of,
    put_drop_in,
    remove_drop_in,
    rotate,
)
from tests.support import makeimage
from tests.support.daemon_process import BACKUP, NEW, OLD, PREFIX

UNIT = "luksrotd.service"
REACHED, GO = "/run/luksrotd/reached", "/run/luksrotd/go"
TESTS = "/opt/luksrotd"


def test_boots_with_nothing_failed(container):
    assert container.run("systemctl", "--failed", "--no-legend").stdout == ""
    assert container.run("systemctl", "is-system-running").stdout == "running\n"


def test_reconcile_has_run_before_the_daemon(container):
    daemon, reconcile = container.show(UNIT), container.show("luksrotd-reconcile.service")
    assert reconcile["Result"] == "success"
    assert 0 < int(reconcile["ExecMainExitTimestampMonotonic"]) <= int(daemon["ExecMainStartTimestampMonotonic"])


def test_a_daemon_that_hangs_is_killed_and_started_again(container, volume):
    enroll(container, volume)
    put_drop_in(container, "WatchdogSec=1s")
    restart(container)
    hung = main_pid(container)
    container.run("kill", "-STOP", str(hung))
    remove_drop_in(container)
    active_again(container, hung)
    assert "Watchdog timeout" in container.journal(UNIT)
    restart(container)
    assert luksrotctl(container, "reconcile", volume.node).endswith("clean\n")
    assert [volume.opens(secret) for secret in (OLD, BACKUP)] == [True, True]


def test_a_reload_makes_changes_hold_and_nobody_starts_anew(container, volume):
    pid = main_pid(container)
    drop_in = "/etc/luksrotd/luksrotd.conf.d/60-deny.conf"
    container.put(drop_in, f"[Devices]\nDeny=uuid:{volume.uuid}\n")
    container.run("systemctl", "reload", UNIT)
    until(lambda: volume.uuid not in luksrotctl(container, "list"), "the volume is not managed any more")
    container.run("rm", drop_in)
    container.run("systemctl", "reload", UNIT)
    until(lambda: volume.uuid in luksrotctl(container, "list"), "it is managed again")
    assert main_pid(container) == pid


def test_what_was_staged_and_what_was_known_outlive_a_reboot(container, volume):
    """The inventory in /var/lib tells a keyslot that has come while the machine was down from those that were there."""
    enroll(container, volume)
    container.put("/root/new.key", NEW.decode(), mode=0o600)
    luksrotctl(container, "stage", volume.node, "--key-file=/root/old.key", "--new-keyfile=/root/new.key")
    container.run("systemctl", "stop", UNIT)
    makeimage.add_key(volume.node, OLD, b"a stranger's", "--key-slot", "7")
    container.reboot()
    assert container.run("systemctl", "is-system-running").stdout == "running\n"
    problems = property_of(container, volume.path, "org.luksrotd1.Device", "Problems")
    assert any("suspect" in str(problem).lower() and "7" in str(problem) for problem in problems), problems
    luksrotctl(container, "finish", volume.node)
    assert [volume.opens(secret) for secret in (OLD, BACKUP, NEW)] == [True, False, True]
    assert [name for name, _ in volume.pairs()] == ["backup"]


# -- in the middle of a commit ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workshop(release, loop_volume):
    """A machine with this project's tests, whose daemon can be made to stop before its n-th write or flush."""
    binds = {f"{TESTS}/tests": PROJECT / "tests"}
    with Container(roots.installed(release), binds=binds, devices=[loop_volume.path], files=FAST_KEYS) as container:
        yield container


@pytest.fixture
def enrolled(workshop, loop_volume):
    """The volume in it, with the managed key ``BACKUP``."""
    disk = renewed(workshop, loop_volume)
    enroll(workshop, disk)
    return disk


def restart(container):
    """Start the daemon anew, however often that has been done within the unit's limit of starts."""
    container.run("systemctl", "reset-failed", UNIT)
    container.run("systemctl", "restart", UNIT)


def hold_rotation(container, volume, number):
    """Start a rotation to ``NEW``, whose commit comes to that write or flush, counted from 0, and waits for ``GO``.

    Whoever starts the daemon from here on, starts the one of the package.
    """
    plan = json.dumps({"hold": number, "reached": REACHED, "go": GO, "prefix": PREFIX, "config": "/etc/luksrotd"})
    command = f"/usr/bin/python3 -m tests.support.daemon_launcher '{plan}'"
    put_drop_in(container, f"Environment=PYTHONPATH={TESTS}\nExecStart=\nExecStart={command}")
    container.run("rm", "-f", REACHED, GO)
    restart(container)
    remove_drop_in(container)
    rotate(container, volume)
    until(lambda: container.run("test", "-e", REACHED, check=False).returncode == 0, "the commit waits")


@pytest.mark.parametrize("number", [1, 4, 7, 10])
def test_killed_in_a_commit_it_is_started_again_and_finishes(workshop, enrolled, number):
    hold_rotation(workshop, enrolled, number)
    killed = main_pid(workshop)
    workshop.run("kill", "-KILL", str(killed))
    active_again(workshop, killed)
    until(
        lambda: (
            property_of(workshop, enrolled.path, "org.luksrotd1.Device", "Busy") is False
            and property_of(workshop, enrolled.path, "org.luksrotd1.Device", "Problems") == []
        ),
        "the volume is reconciled",
    )
    opens = [enrolled.opens(secret) for secret in (OLD, BACKUP, NEW)]
    assert opens == ([True, True, False] if number == 1 else [True, False, True])
    assert len(enrolled.pairs()) == 1
    assert luksrotctl(workshop, "--direct", "reconcile", enrolled.node).endswith("clean\n")


def test_a_stop_lets_a_commit_come_to_its_end(workshop, enrolled):
    hold_rotation(workshop, enrolled, 4)
    workshop.run("systemctl", "stop", "--no-block", UNIT)
    until(lambda: workshop.show(UNIT)["ActiveState"] == "deactivating", "it stops")
    workshop.run("touch", GO)
    until(lambda: workshop.show(UNIT)["ActiveState"] == "inactive", "it has stopped")
    assert workshop.show(UNIT)["Result"] == "success"
    assert [enrolled.opens(secret) for secret in (OLD, BACKUP, NEW)] == [True, False, True]
    assert luksrotctl(workshop, "--direct", "reconcile", enrolled.node).endswith("clean\n")
    workshop.run("systemctl", "start", UNIT)
