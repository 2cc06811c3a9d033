# SPDX-License-Identifier: GPL-2.0-or-later
"""How much memory there is: control groups of both versions, alone and together, in a tree as the kernel shows it."""

from pathlib import Path

import pytest

from luksrotd.host.memory import available_kib

GIB = 1024 * 1024
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
CPU = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"
UNIFIED = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"


@pytest.fixture
def machine(tmp_path):
    """Make one of 8 GiB."""

    def make(cgroup, mountinfo, **limits):
        proc = tmp_path / "proc/self"
        proc.mkdir(parents=True)
        (proc / "cgroup").write_text(cgroup + "\n")
        (proc / "mountinfo").write_text("\n".join(("23 1 8:1 / / rw - ext4 /dev/sda1 rw", *mountinfo, "")))
        (tmp_path / "proc/meminfo").write_text(f"MemTotal:       {8 * GIB} kB\nMemFree:         1 kB\n")
        for path, limit in limits.items():
            file = tmp_path / "sys/fs/cgroup" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{limit * 1024 if isinstance(limit, int) else limit}\n")
        return tmp_path

    return make


def test_without_a_limit_it_is_what_the_machine_has(machine):
    root = machine("0::/system.slice/x", [V2], **{"system.slice/x/memory.max": "max"})
    assert available_kib(root) == 8 * GIB


@pytest.mark.parametrize("file", ["memory.max", "memory.high"])
@pytest.mark.parametrize("where", ["", "system.slice/", "system.slice/luksrotd.service/"])
def test_every_group_up_the_tree_limits(machine, file, where):
    limits = {"system.slice/memory.max": 5 * GIB, f"{where}{file}": 4 * GIB}
    root = machine("0::/system.slice/luksrotd.service", [CPU, V2], **limits)
    assert available_kib(root) == 4 * GIB


def test_groups_of_others_do_not(machine):
    root = machine("0::/system.slice/x", [V2], **{"user.slice/memory.max": GIB, "system.slice/x/y/memory.max": GIB})
    assert available_kib(root) == 8 * GIB


def test_version_1(machine):
    cgroup = "9:cpu:/elsewhere\n4:cpuset,memory:/system.slice/x"
    limits = {"memory/system.slice/memory.limit_in_bytes": 2 * GIB, "cpu/elsewhere/memory.limit_in_bytes": GIB}
    assert available_kib(machine(cgroup, [CPU, V1], **limits)) == 2 * GIB


def test_version_1_says_unlimited_by_a_number(machine):
    root = machine("4:memory:/x", [V1], **{"memory/x/memory.limit_in_bytes": "9223372036854771712"})
    assert available_kib(root) == 8 * GIB


def test_both_versions_at_once(machine):
    limits = {"memory/x/memory.limit_in_bytes": 3 * GIB, "unified/memory.max": GIB}
    assert available_kib(machine("4:memory:/x\n0::/y", [V1, UNIFIED], **limits)) == GIB


def test_a_container_sees_a_part_of_the_tree(machine):
    part = V2.replace(" / /sys", " /docker/7 /sys")
    root = machine("0::/docker/7/sub", [part], **{"sub/memory.max": GIB})
    assert available_kib(root) == GIB


@pytest.mark.parametrize("path", ["/../other", "/docker/77"])
def test_a_group_that_is_not_in_sight_is_taken_for_the_topmost(machine, path):
    part = V2.replace(" / /sys", " /docker/7 /sys") if path.startswith("/docker") else V2
    limits = {"memory.max": GIB, "../other/memory.max": 1}
    assert available_kib(machine(f"0::{path}", [part], **limits)) == GIB


def test_a_mount_point_with_a_space(machine):
    odd = V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/a\\040b")
    assert available_kib(machine("0::/", [odd], **{"a b/memory.max": GIB})) == GIB


def test_where_nothing_can_be_read_nothing_is_known(tmp_path):
    assert available_kib(tmp_path) == 0


def test_this_machine():
    total = int(Path("/proc/meminfo").read_text().split()[1])
    assert 0 < available_kib() <= total
