# SPDX-License-Identifier: GPL-2.0-or-later
"""The bed itself: what a container gives, and that nothing of it is left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.beds import roots
from tests.beds.container import PROJECT, CommandFailed, Container
from tests.beds.supervisor import cgroup_mounts
from tests.beds.waiting import until

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.beds.container import Container
container = Container(Path(sys.argv[1])).__enter__()
container.popen("sleep", "infinity")
print(container.name, container.leader, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def bare(release):
    with Container(roots.base(release)) as container:
        yield container


def traces(name):
    """What there is of a container on this machine: control groups, and mounts in this process's namespace."""
    groups = [path for mount in cgroup_mounts() if (path := mount / name).exists()]
    return groups + [line for line in Path("/proc/mounts").read_text().splitlines() if name in line]


def test_a_command_has_input_output_status_and_user(bare):
    assert bare.run("tr", "a-z", "A-Z", input="spoken").stdout == "SPOKEN"
    assert bare.run("sh", "-c", "echo bad >&2; exit 3", check=False).returncode == 3
    with pytest.raises(CommandFailed, match="status 3\nbad"):
        bare.run("sh", "-c", "echo bad >&2; exit 3")
    assert bare.run("id", "-un", user="games").stdout == "games\n"


def test_a_reboot_keeps_files_and_nothing_else(bare):
    bare.put("/root/kept", "kept")
    bare.put("/run/gone", "gone")
    leader = bare.leader
    bare.reboot()
    assert bare.leader != leader
    assert bare.run("cat", "/root/kept").stdout == "kept"
    assert bare.run("test", "-e", "/run/gone", check=False).returncode == 1


def test_the_root_is_never_written(bare, release):
    bare.put("/root/written", "here")
    assert not (roots.base(release) / "root/written").exists()


def test_there_is_no_network_and_no_device_of_others(bare):
    assert bare.run("ls", "/sys/class/net").stdout == "lo\n"
    assert bare.run("find", "/dev", "-type", "b").stdout == ""


def test_a_container_leaves_nothing(release):
    with Container(roots.base(release)) as container:
        name, leader = container.name, container.leader
        assert traces(name)
    assert traces(name) == []
    until(lambda: not Path(f"/proc/{leader}").exists(), "whoever inherited it has reaped its PID 1")


def test_nor_does_it_when_its_test_is_killed(release, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(roots.base(release))],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    name, leader = done.stdout.split()
    until(lambda: not traces(name) and not Path(f"/proc/{leader}").exists(), "the container is gone")
    until(lambda: not list(tmp_path.iterdir()), "its scratch folder is gone")
