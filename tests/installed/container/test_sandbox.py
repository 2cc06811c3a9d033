# SPDX-License-Identifier: GPL-2.0-or-later
"""The sandbox of the units on a booted system: it lets every verb work, and keeps out what it should."""

import json
import re
from pathlib import Path

import pytest

from luksrotd.service.jobs import Kind
from tests.beds import roots
from tests.beds.container import Container
from tests.support import makeimage
from tests.support.kernel import LoopDevice

DAEMON, BOOT, ONE = "luksrotd.service", "luksrotd-reconcile.service", "luksrotd-reconcile@.service"
UNITS = "/lib/systemd/system"
DROP_IN = f"/etc/systemd/system/{DAEMON}.d/50-test.conf"
OLD, FAST = b"the first key", ("--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000")
GIB = ("--pbkdf=argon2id", "--pbkdf-memory=1048576", "--pbkdf-force-iterations=4", "--pbkdf-parallel=2")
IMAGE = "/srv/images/vault.img"

#: What each service must be able to do, of what the probe tries; everything else must be refused.
NEEDED = {"new program", "device", "state", "locks", "libcryptsetup's locks", "temporary file", "seccomp", "socket AF_UNIX"}
ALLOWED = {
    DAEMON: NEEDED | {"socket AF_NETLINK", "key file in /root"},
    BOOT: NEEDED,
    ONE: NEEDED | {"key file in /root"},
}
#: Refused without any sandbox, too, by the kernel that the containers share or by the container.
IMPOSSIBLE = {"socket AF_ALG", "module", "real time"}
#: What says nothing: the probe has not come to what it was to try.
SILENT = {"ENOENT", "ended"}


@pytest.fixture(scope="module", params=roots.RELEASES)
def release(request):
    return request.param


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A loop device with a volume that ``OLD`` opens, for a container."""
    image = makeimage.make_image(tmp_path_factory.mktemp("sandbox") / "disk.img", key=OLD)
    with LoopDevice(image) as loop:
        yield str(loop.path)


@pytest.fixture(scope="module")
def box(release, disk):
    files = {
        "/opt/probe.py": Path(__file__).with_name("probe.py").read_text(),
        "/root/probe.key": "secret",
    }
    with Container(roots.installed(release), devices=[Path(disk)], files=files) as container:
        container.run("chmod", "0600", "/root/probe.key")
        container.put("/root/old", OLD.decode(), mode=0o600)
        container.run("mknod", "/dev/mem", "c", "1", "1")
        container.run("mknod", "/dev/loop-control", "c", "10", "237")
        yield container


def probed(box, unit, disk):
    """What the probe says in the place of the unit's program."""
    text = re.sub(
        r"(?m)^(Type|BusName|Sockets|Exec(?:Start|StartPre|Reload)|Restart\w*|WatchdogSec)=.*\n", "", box.run("cat", f"{UNITS}/{unit}").stdout
    )
    text = text.replace("[Service]", f"[Service]\nType=oneshot\nExecStart=python3 /opt/probe.py {disk}")
    text = text.replace("[Service]", "[Service]\nStandardOutput=truncate:/run/probe.json")
    template, instance = (
        ("probe@", box.run("systemd-escape", "--path", disk).stdout.strip()) if "@" in unit else ("probe", "")
    )
    box.put(f"/run/systemd/system/{template}.service", text)
    box.run("systemctl", "daemon-reload")
    box.run("systemctl", "start", f"{template}{instance}.service")
    box.run("systemctl", "stop", f"{template}{instance}.service")
    return json.loads(box.run("cat", "/run/probe.json").stdout)


def test_without_a_sandbox_the_probe_can_do_all_that(box, disk):
    """Else what it is refused below proves nothing."""
    found = json.loads(box.run("unshare", "--mount", "--uts", "python3", "/opt/probe.py", disk).stdout)["service"]
    assert {what: outcome for what, outcome in found.items() if outcome != "done" and what not in IMPOSSIBLE} == {}


@pytest.mark.parametrize("unit", [DAEMON, BOOT, ONE])
def test_a_service_can_do_what_it_must_and_nothing_else(box, disk, unit):
    found = probed(box, unit, disk)["service"]
    assert {what for what, outcome in found.items() if outcome == "done"} == ALLOWED[unit]
    assert {what: outcome for what, outcome in found.items() if outcome in SILENT} == {}
    assert found["socket AF_INET"] == found["socket AF_INET6"] == "EAFNOSUPPORT"


@pytest.mark.parametrize("unit", [DAEMON, BOOT, ONE])
def test_a_worker_can_do_nothing_of_all_that(box, disk, unit):
    told = probed(box, unit, disk)
    found = told["worker"]
    allowed = {what for what, outcome in found.items() if outcome == "done"}
    assert allowed <= {"socket AF_UNIX", "socket AF_NETLINK"}
    assert {what: outcome for what, outcome in found.items() if outcome in SILENT} == {}
    assert found["read device"] == found["write device"] == "EACCES"


def test_the_daemon_has_a_network_namespace_without_a_network(box, disk):
    told = probed(box, DAEMON, disk)
    assert told["interfaces"] == ["lo"]
    assert told["network"] != box.run("readlink", "/proc/1/ns/net").stdout.strip()
