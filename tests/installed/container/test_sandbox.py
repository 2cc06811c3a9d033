# SPDX-License-Identifier: GPL-2.0-or-later
"""The sandbox of the units on a booted system: it lets every verb work, and keeps out what it should."""

import json
import re
from pathlib import Path

import pytest

from luksrotd.service.jobs import Kind
from tests.beds import roots
from tests.beds.container import Container
from tests.beds.waiting import until
from tests.support import makeimage
from tests.support.kernel import LoopDevice

DAEMON, BOOT, ONE = "luksrotd.service", "luksrotd-reconcile.service", "luksrotd-reconcile@.service"
UNITS = "/lib/systemd/system"
DROP_IN = f"/etc/systemd/system/{DAEMON}.d/50-test.conf"
OLD, FAST = b"the first key", ("--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000")
GIB = ("--pbkdf=argon2id", "--pbkdf-memory=1048576", "--pbkdf-force-iterations=4", "--pbkdf-parallel=2")
IMAGE = "/srv/images/vault.img"

#: What each service must be able to do, of what the probe tries; everything else must be refused.
NEEDED = {"device", "state", "locks", "libcryptsetup's locks", "temporary file", "seccomp", "socket AF_UNIX"}
ALLOWED = {
    DAEMON: NEEDED | {"socket AF_NETLINK", "key file in /root"},
    BOOT: NEEDED,
    ONE: NEEDED | {"key file in /root"},
}
#: Refused without any sandbox, too, by the kernel that the containers share or by the container.
IMPOSSIBLE = {"socket AF_ALG", "module", "/dev/mem"}
#: What says nothing: the probe has not come to what it was to try.
SILENT = {"ENOENT", "ended"}


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
        r"(?m)^(Type|BusName|Sockets|Exec(?:Start|StartPre|Reload)|Restart\w*|WatchdogSec)=.*\n",
        "",
        box.run("cat", f"{UNITS}/{unit}").stdout,
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


def ctl(box, *arguments):
    """luksrotctl, through the daemon; what it printed."""
    return box.run("luksrotctl", *arguments).stdout


def on_bus(box, disk, method, signature, *arguments):
    """A method of the volume's object, by busctl."""
    asked = ("org.luksrotd1", "/org/luksrotd1", "org.luksrotd1.Manager", "GetDevice", "sa{sv}", disk, "0")
    path = json.loads(box.run("busctl", "--json=short", "call", *asked).stdout)["data"][0]
    said = box.run(
        "busctl", "--json=short", "call", "org.luksrotd1", path, "org.luksrotd1.Device", method, signature, *arguments
    )
    return json.loads(said.stdout)["data"]


#: A transaction of two tokens, on one connection.
TRANSACTION = """
import asyncio, sys
from dbus_next import BusType, Variant
from dbus_next.aio import MessageBus

async def main():
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    async def proxy(path, name):
        interface = "org.luksrotd1." + name
        seen = await bus.introspect("org.luksrotd1", path)
        return bus.get_proxy_object("org.luksrotd1", path, seen).get_interface(interface)
    manager = await proxy("/org/luksrotd1", "Manager")
    device = await proxy(await manager.call_get_device(sys.argv[1], {}), "Device")
    transaction = await proxy(await device.call_begin_transaction({}), "Transaction")
    await transaction.call_set_token('{"type": "probe", "keyslots": []}', {})
    job = await proxy(await transaction.call_commit({}), "Job")
    while await job.get_state() not in ("finished", "failed", "cancelled"):
        await asyncio.sleep(0.02)
    print(await job.get_state())

asyncio.run(main())
"""


def test_every_verb_works_in_the_sandbox(box, disk):
    unlock, key = "--key-file=/root/old", [f"/root/{number}" for number in range(4)]
    ctl(box, "enroll", disk, unlock, "--generate", f"--output={key[0]}", "--data={}", *FAST)
    ctl(box, "verify", disk, f"--key-file={key[0]}")
    ctl(box, "stage", disk, f"--key-file={key[0]}", "--generate", f"--output={key[1]}", *FAST)
    ctl(box, "abort", disk)
    ctl(box, "stage", disk, f"--key-file={key[0]}", "--generate", f"--output={key[2]}", *FAST)
    ctl(box, "finish", disk)
    ctl(box, "set-data", disk, '--data={"vault": 7}')
    ctl(box, "adopt", disk, "--name=other", "--keyslot=0", unlock)
    ctl(box, "release", disk, "--name=other")
    managed = json.loads(ctl(box, "show", disk, "--json"))["keys"][0]
    box.run("cryptsetup", "token", "remove", "--token-id", str(managed["token"]), disk)
    ctl(box, "recreate", disk, f"--key-file={key[2]}", "--data={}")
    ctl(box, "scrub", disk)
    ctl(box, "reconcile", disk)
    assert box.run("python3", "-", disk, input=TRANSACTION).stdout == "finished\n"
    # A gibibyte, as libcryptsetup chooses on a machine with enough memory.
    ctl(box, "rotate", disk, f"--key-file={key[2]}", "--generate", f"--output={key[3]}", *GIB)
    ctl(box, "remove", disk, unlock)
    assert json.loads(ctl(box, "show", disk, "--json"))["keys"] == []
    recorded = {record.get("kind") for record in json.loads(ctl(box, "history", disk, "--json"))["records"]}
    assert recorded >= {kind.value for kind in Kind} - {Kind.VERIFY, Kind.RECONCILE}
    assert "cannot" not in box.journal(DAEMON)


def test_what_the_daemon_reads_itself(box, disk):
    """A key file of root's, and the credential that needs no drop-in."""
    store = "/etc/credstore.encrypted"
    box.run("mkdir", "-p", store)
    box.run(
        "systemd-creds", "encrypt", "--with-key=host", "--name=luksrotd.unlock", "/root/old", f"{store}/luksrotd.unlock"
    )
    box.run("systemctl", "restart", DAEMON)
    box.put("/root/backup", "the backup key", mode=0o600)
    ctl(box, "enroll", disk, "--key-file=/root/old", "--new-keyfile=/root/backup", "--name=file", *FAST)
    verify = ("VerifyKey", "sa{sv}a{sv}", "file", "1")
    assert on_bus(box, disk, *verify, "keyfile", "s", "/root/backup", "0") == [True]
    assert on_bus(box, disk, *verify, "credential", "s", "luksrotd.unlock", "0") == [False]


def test_an_image_can_be_changed_where_a_drop_in_says_so(box):
    box.run("mkdir", "-p", str(Path(IMAGE).parent), "/etc/luksrotd/luksrotd.conf.d")
    box.run("truncate", "--size=20M", IMAGE)
    box.run("cryptsetup", "luksFormat", "--batch-mode", *FAST, IMAGE, "/root/old")
    box.put("/etc/luksrotd/luksrotd.conf.d/image.conf", f"[Volume]\nPath={IMAGE}\n")
    box.run("systemctl", "restart", DAEMON)
    enroll = ("luksrotctl", "enroll", IMAGE, "--key-file=/root/old", "--new-keyfile=/root/old2", *FAST)
    box.put("/root/old2", "another key", mode=0o600)
    refused = box.run(*enroll, check=False)
    assert refused.returncode == 1
    assert "Read-only file system" in refused.stderr
    box.put(DROP_IN, f"[Service]\nReadWritePaths={Path(IMAGE).parent}\n")
    box.run("systemctl", "daemon-reload")
    box.run("systemctl", "restart", DAEMON)
    box.run(*enroll)


def sees_what_others_write(box, disk):
    """By the socket of luksrotd-udev.socket; its events say that somebody else has written."""
    before = json.loads(ctl(box, "show", disk, "--json"))["seqid"]
    box.put("/root/token", '{"type": "foreign", "keyslots": []}')
    box.run("cryptsetup", "token", "import", "--json-file=/root/token", disk)

    def seqid():
        uuid = json.loads(ctl(box, "show", disk, "--json"))["uuid"].replace("-", "_")
        shown = box.run(
            "busctl",
            "--json=short",
            "get-property",
            "org.luksrotd1",
            f"/org/luksrotd1/device/{uuid}",
            "org.luksrotd1.Device",
            "Generation",
        )
        return json.loads(shown.stdout)["data"]

    until(lambda: seqid() > before, "the daemon has seen what cryptsetup has done")


def test_a_device_that_comes_is_seen_without_a_network(box, disk):
    sees_what_others_write(box, disk)


def test_so_it_is_after_a_crash(box, disk):
    killed = box.show(DAEMON)["MainPID"]
    box.run("kill", "-KILL", killed)

    def again():
        unit = box.show(DAEMON)
        return unit["ActiveState"] == "active" and unit["MainPID"] not in ("0", killed)

    until(again, "the daemon runs again")
    sees_what_others_write(box, disk)


def test_a_worker_at_work_is_confined(box, disk):
    """A real one, while it derives a key: whose it is, what it may do, and what it has open."""
    box.put("/root/slow", "a slow key", mode=0o600)
    slow = ("--pbkdf=pbkdf2", "--pbkdf-force-iterations=500000000")
    running = box.popen(
        "luksrotctl", "enroll", disk, "--key-file=/root/old", "--new-keyfile=/root/slow", "--name=slow", *slow
    )
    found = {}

    def workers():
        return box.run("pgrep", "-u", "luksrotd-worker", check=False).stdout.split()

    def deriving():
        for pid in workers():
            status = box.run("cat", f"/proc/{pid}/status", check=False).stdout
            told = dict(line.split(":", 1) for line in status.splitlines())
            if told.get("Seccomp", "").strip() == "2":  # not that which waits for the next job
                found.update(told, pid=pid, files=box.run("ls", "-l", f"/proc/{pid}/fd").stdout)
                return True
        return False

    try:
        until(deriving, "a worker derives")
    finally:
        box.run("pkill", "-x", "luksrotctl")
        running.wait()
    assert "0" not in found["Uid"].split() + found["Gid"].split()
    assert {int(found[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} <= {0, 0xE0}
    assert int(found["CapEff"], 16) == int(found["CapPrm"], 16) == 0
    assert found["NoNewPrivs"].strip() == "1"
    assert "/dev/loop" not in found["files"]
    until(lambda: found["pid"] not in workers(), "the worker has been killed")
