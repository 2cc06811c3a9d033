# SPDX-License-Identifier: GPL-2.0-or-later
"""dbus-broker in place of dbus-daemon: the same tests again, in a test bed of their own."""

import os
import subprocess
import sys
from tempfile import TemporaryDirectory

from tests.support.testbed import BUS_VARIABLE, PROJECT

#: What depends on the bus: calls and signals, limits, descriptors, jobs, transactions, other libraries, its restart.
TESTS = (
    "tests/bus/test_caller.py",
    "tests/bus/test_hardening.py",
    "tests/bus/test_link.py",
    "tests/integration/test_api.py",
    "tests/integration/test_clients.py",
    "tests/integration/test_jobs.py",
    "tests/integration/test_life.py",
    "tests/integration/test_transactions.py",
)


def test_the_service_on_dbus_broker():
    environment = {**os.environ, BUS_VARIABLE: "dbus-broker"}
    with TemporaryDirectory(prefix="broker-") as scratch:  # a short path: there will be sockets in it
        argv = [sys.executable, "-m", "pytest", "-q", "--no-cov", "--tb=native", f"--basetemp={scratch}", *TESTS]
        run = subprocess.run(argv, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-10000:] + run.stderr[-2000:]
