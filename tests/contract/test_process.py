# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel tells of a process, on real processes and on what /proc has looked like on real systems."""

import os
import subprocess
import sys

import pytest

from luksrotd.host.process import client_and_unit, myself, unit_of
from tests.contract.conftest import child


@pytest.mark.parametrize(
    ("cgroups", "unit"),
    [
        ("0::/system.slice/cron.service\n", "cron.service"),
        ("0::/user.slice/user-1000.slice/session-3.scope\n", "session-3.scope"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-x.scope\n", "user@1000.service"),
        ("0::/system.slice/system-getty.slice/getty@tty1.service\n", "getty@tty1.service"),
        ("0::/system.slice/_cpu.service/x\n", "cpu.service"),
        ("0::/init.scope\n", "init.scope"),
        ("0::/\n", ""),
        ("", ""),
        ("nonsense\n0\n:\n", ""),
        # hybrid: systemd's own hierarchy, and the unified one with it
        (
            "4:memory:/x.service\n1:name=systemd:/system.slice/ssh.service\n0::/system.slice/ssh.service\n",
            "ssh.service",
        ),
        # hybrid, where nothing is in the unified one
        ("4:memory:/other.service\n1:name=systemd:/user.slice/user-0.slice/session-1.scope\n0::/\n", "session-1.scope"),
        # old: no unified one
        ("9:name=systemd:/system.slice/dbus.service\n8:cpu,cpuacct:/system.slice/fake.service\n", "dbus.service"),
    ],
)
def test_units_in_every_layout_of_cgroups(cgroups, unit):
    assert unit_of(cgroups) == unit


def test_a_users_own_cgroup_makes_no_unit_of_the_system():
    """Whoever was given a subtree may call what is below as he likes."""
    path = "/user.slice/user-1000.slice/user@1000.service/app.slice/luksrotd.service/luksrotd-reconcile.service"
    assert unit_of(f"0::{path}\n") == "user@1000.service"


def test_a_process_is_known_by_the_name_that_the_kernel_has():
    with child("sleep", "60") as process:
        pidfd = os.pidfd_open(process.pid)
        try:
            assert client_and_unit(process.pid)[0] == "sleep"
            assert client_and_unit(process.pid, pidfd)[0] == "sleep"
            with child("sleep", "60") as other:
                assert client_and_unit(other.pid, pidfd) == ("", "")
            process.kill()
            process.wait()
            assert client_and_unit(process.pid, pidfd) == ("", "")
            assert client_and_unit(process.pid) == ("", "")
        finally:
            os.close(pidfd)


def test_a_descriptor_of_nothing_tells_of_nobody(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        assert client_and_unit(os.getpid(), file.fileno()) == ("", "")


def test_the_name_of_a_process_may_be_anything(tmp_path):
    proc = tmp_path / "7"
    proc.mkdir()
    (proc / "comm").write_bytes(b"a\xff\nb\n")
    (proc / "cgroup").write_bytes(b"0::/\xff.service\n")
    assert client_and_unit(7, proc=tmp_path) == ("a\ufffd\nb", "\ufffd.service")


@pytest.mark.parametrize(
    ("login", "uid"), [("1000", 1000), ("4294967295", os.getuid()), ("", os.getuid()), (None, os.getuid())]
)
def test_who_acts_here_is_who_has_logged_in(tmp_path, login, uid):
    for name in ("self", str(os.getpid())):
        (tmp_path / name).mkdir()
    (tmp_path / str(os.getpid()) / "comm").write_text("tool\n")
    (tmp_path / str(os.getpid()) / "cgroup").write_text("0::/user.slice/session-1.scope\n")
    if login is not None:
        (tmp_path / "self" / "loginuid").write_text(login)
    me = myself(proc=tmp_path)
    assert (me.uid, me.client, me.unit, me.name) == (uid, "tool", "session-1.scope", "")
    assert myself("luksrotctl", proc=tmp_path).client == "luksrotctl"


def test_who_acts_here_for_real():
    code = "from luksrotd.host.process import myself; print(myself().client)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().startswith("python")
