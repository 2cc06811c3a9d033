# SPDX-License-Identifier: GPL-2.0-or-later
"""The test bed: what is in it works, and nothing of it is left, however the tests end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.testbed import TestBed

PROJECT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys, json
from tests.support.testbed import TestBed, unprivileged_argv
with TestBed() as bed:
    image = bed.dir / "image"
    image.write_bytes(bytes(1 << 20))
    disk = bed.loop(image)
    keyring = bed.spawn(["sleep", "1000"])
    print(json.dumps({"pids": [bed.bus_pid, bed.polkitd_pid, keyring.pid], "loop": disk.path.name}), flush=True)
    sys.stdin.readline()
print("left", flush=True)
sys.stdin.read()
"""


def start() -> tuple[subprocess.Popen, dict]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=PROJECT, text=True
    )
    return process, json.loads(process.stdout.readline())


def eventually(condition) -> bool:
    """Poll: the kernel and the keeper work in their own time."""
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_clean(state: dict, image: str) -> bool:
    backing = Path(f"/sys/block/{state['loop']}/loop/backing_file")
    attached = backing.exists() and image in backing.read_text()
    return not attached and not any(Path(f"/proc/{pid}").exists() for pid in state["pids"])


def backing_of(state: dict) -> str:
    return Path(f"/sys/block/{state['loop']}/loop/backing_file").read_text().strip()


def test_nothing_is_left_after_a_kill():
    host_mounts = Path("/proc/self/mounts").read_text()
    process, state = start()
    image = backing_of(state)
    assert image.endswith("image")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert eventually(lambda: is_clean(state, image))
    assert Path("/proc/self/mounts").read_text() == host_mounts


def test_nothing_is_left_after_leaving_and_the_host_is_seen_again():
    process, state = start()
    image = backing_of(state)
    root = Path(f"/proc/{process.pid}/root")
    assert (root / "run/luksrotd-testbed/image").exists()
    process.stdin.write("leave\n")
    process.stdin.flush()
    assert process.stdout.readline() == "left\n"
    assert not (root / "run/luksrotd-testbed/image").exists()
    assert (root / "run").samefile("/run")
    assert is_clean(state, image)
    process.communicate()


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_loop_devices_have_the_sector_size_and_are_known_to_udev(bed, sector_size):
    image = bed.dir / f"image-{sector_size}"
    image.write_bytes(bytes(32 << 20))
    subprocess.run(["cryptsetup", "-q", "luksFormat", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", image, "-"],
                   input=b"x", check=True)  # fmt: skip
    disk = bed.loop(image, sector_size)
    assert Path(f"/sys/block/{disk.path.name}/queue/logical_block_size").read_text().strip() == str(sector_size)
    subprocess.run(["udevadm", "settle", "--timeout=20"], check=True)
    shown = subprocess.run(["udevadm", "info", "-q", "property", disk.path], capture_output=True, text=True, check=True)
    assert "ID_FS_TYPE=crypto_LUKS" in shown.stdout
    disk.detach()
    disk.detach()
    assert eventually(lambda: not Path(f"/sys/block/{disk.path.name}/loop/backing_file").exists())


def test_the_journal_takes_entries(bed):
    subprocess.run(["systemd-cat", "-t", "testbed", "echo", "heard"], check=True)
    argv = ["journalctl", "-D", "/run/log/journal", "-t", "testbed", "-o", "cat"]
    read = lambda: subprocess.run(argv, capture_output=True, text=True, check=False).stdout  # noqa: E731 - one line
    assert eventually(lambda: read() == "heard\n")


def test_the_host_s_locks_are_out_of_reach(bed):
    for directory in ("/run/cryptsetup", "/run/luksrotd"):
        Path(directory).mkdir(mode=0o700, exist_ok=True)
        (Path(directory) / "of-the-bed").touch()
    host = Path(f"/proc/{os.getppid()}/root/run")
    assert not (host / "luksrotd/of-the-bed").exists()
    assert not (host / "cryptsetup/of-the-bed").exists()


def test_users_are_unprivileged(bed):
    assert bed.user("nobody") == bed.user(bed.user("nobody").pw_uid)
    assert bed.user("games").pw_uid != 0


def test_an_agent_of_no_known_mode_is_refused(bed):
    assert isinstance(bed, TestBed)
    with pytest.raises(ValueError, match="maybe"):
        bed.agent("maybe", 1, 0)
