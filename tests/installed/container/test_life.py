# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of the service under systemd: boot, watchdog, crash, reload, stop and reboot."""

import json
import signal

import pytest

from tests.beds import roots
from tests.beds.container import PROJECT, Container
from tests.beds.waiting import until
from tests.installed.conftest import FAST_KEYS
from tests.installed.container.actions import enroll, luksrotctl, main_pid, property_of
from tests.support.daemon_process import BACKUP, NEW, OLD, PREFIX

UNIT = "luksrotd.service"
DROP_IN = "/etc/systemd/system/luksrotd.service.d"


def test_boots_with_nothing_failed(container):
    assert container.run("systemctl", "--failed", "--no-legend").stdout == ""
    assert container.run("systemctl", "is-system-running").stdout == "running\n"


def test_reconcile_has_run_before_the_daemon(container):
    daemon, reconcile = container.show(UNIT), container.show("luksrotd-reconcile.service")
    assert reconcile["Result"] == "success"
    assert int(reconcile["ExecMainExitTimestampMonotonic"]) <= int(daemon["ExecMainStartTimestampMonotonic"])


def test_a_daemon_that_hangs_is_killed_and_started_again(container, volume):
    enroll(container, volume)
    container.put(f"{DROP_IN}/50-watchdog.conf", "[Service]\nWatchdogSec=2s\n")
    container.run("systemctl", "daemon-reload")
    container.run("systemctl", "restart", UNIT)
    hung = main_pid(container)
    try:
        container.run("kill", "-STOP", str(hung))
        until(lambda: main_pid(container) not in (0, hung), "systemd has started it again")
        until(lambda: container.show(UNIT)["ActiveState"] == "active", "it has started")
    finally:
        container.run("rm", f"{DROP_IN}/50-watchdog.conf")
        container.run("systemctl", "daemon-reload")
    assert "Watchdog timeout" in container.journal(UNIT)
    assert "State" in luksrotctl(container, "show", volume.node) or True
    assert [volume.opens(secret) for secret in (OLD, BACKUP)] == [True, True]


@pytest.fixture(scope="module")
def held(release, loop_volume):
    """A container whose daemon stops before its n-th write or flush, while /run/luksrotd/hold says so."""
    binds = {"/opt/luksrotd/tests": PROJECT / "tests"}
    with Container(roots.installed(release), binds=binds, devices=[loop_volume.path], files=FAST_KEYS) as container:
        yield container
