# SPDX-License-Identifier: GPL-2.0-or-later
"""Unattended rotation as an administrator sets it up: luksrotd-rotate@.timer and its service."""

import json
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from luksrotd.rotation.token import utc
from tests.beds import roots
from tests.beds.container import Container
from tests.beds.waiting import until
from tests.support import makeimage
from tests.support.daemon_process import BACKUP, OLD, PREFIX, Disk
from tests.support.escrow import KEY
from tests.support.kernel import LoopDevice

ESCROW = "/etc/luksrotd/escrow"
STATE = "/var/lib/luksrotd-escrow"
DATA = {"escrow": "vault/unattended"}
TAKES = f"#!/bin/sh\nset -e\ncat >$STATE_DIRECTORY/key-$LUKSROTD_GENERATION\necho '{json.dumps(DATA)}'\n"
FAILS = f"{TAKES}echo the vault is shut >&2\nexit 1\n"
#: In tenths, as of `systemd-analyze security`; most of it is the network, which an escrow needs.
EXPOSURE = 15


#: A battery that is in use, and a power supply without power, where systemd looks; VERIFY makes it look at no more.
POWER = """
mkdir -p /run/power/AC /run/power/BAT0
cd /run/power
echo Mains >AC/type
echo 0 >AC/online
echo Battery >BAT0/type
echo Discharging >BAT0/status
echo System >BAT0/scope
for supply in AC BAT0; do
    echo POWER_SUPPLY_NAME=$supply >$supply/uevent
    ln -sfn ../../power_supply $supply/subsystem
done
mount --bind . /sys/class/power_supply
"""
VERIFY = {"/etc/systemd/system.conf.d/50-bed.conf": "[Manager]\nManagerEnvironment=SYSTEMD_DEVICE_VERIFY_SYSFS=0\n"}


class Machine:
    """A container, and the volume whose key it rotates."""

    def __init__(self, container, loop):
        self.container, self.loop, self.volume = container, loop, Disk(loop)
        self.service = f"luksrotd-rotate@{self.volume.uuid}.service"
        self.timer = f"luksrotd-rotate@{self.volume.uuid}.timer"
        self.conf = f"/etc/luksrotd/rotate/{self.volume.uuid}.conf"
        self.credential = f"/etc/credstore.encrypted/luksrotd.unlock-{self.volume.uuid}"

    def run(self, *argv, **more):
        return self.container.run(*argv, **more)

    def key(self):
        """Our token."""
        [token] = [one for one in self.volume.metadata()["tokens"].values() if one["type"] == "luksrotd"]
        return token

    def rotated_ago(self, **since):
        """As of that time, the managed key is ``BACKUP``, of generation 1, and all is as an administrator leaves it."""
        self.run("systemctl", "stop", "luksrotd.service", self.service)
        image = makeimage.make_image(self.loop.image.with_suffix(".new"), key=OLD)
        makeimage.set_uuid(image, self.volume.uuid)
        makeimage.add_key(image, OLD, BACKUP)
        token = {"type": "luksrotd", "keyslots": ["1"], "name": "backup", "generation": 1, "data": {"old": True}}
        makeimage.import_token(image, {**token, "rotated_at": utc(datetime.now(UTC) - timedelta(**since))}, 0)
        subprocess.run(["dd", f"if={image}", f"of={self.volume.node}", "bs=1M", "status=none"], check=True)
        self.run("rm", "-rf", STATE, self.conf)
        self.run("systemctl", "reset-failed")
        self.container.put(ESCROW, TAKES, 0o755)

    def rotates(self, status=0):
        """Start the service; what it has logged since."""
        since = self.run("date", "+%F %T.%6N").stdout.strip()
        assert self.run("systemctl", "start", self.service, check=False).returncode == status
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "-o", "cat", f"--since={since}", f"--unit={self.service}").stdout

    def escrowed(self, generation):
        """The key that the escrow has got; '' if none."""
        return self.run("sh", "-c", f"cat {STATE}/key-{generation} || true").stdout.encode()


@pytest.fixture(scope="module", params=roots.RELEASES)
def machine(request, tmp_path_factory):
    """Both releases, with the credential of the volume."""
    image = makeimage.make_image(tmp_path_factory.mktemp("volume") / f"{PREFIX}rotated.img", key=OLD)
    root = roots.installed(request.param)
    with LoopDevice(image) as loop, Container(root, devices=[loop.path], files=VERIFY) as container:
        machine = Machine(container, loop)
        # As docs/unattended.md says.
        container.run("mkdir", "-p", str(Path(machine.credential).parent))
        container.run("systemd-creds", "encrypt", "-", machine.credential, input=OLD.decode())
        yield machine


@pytest.fixture
def due(machine):
    """A key that is due."""
    machine.rotated_ago(days=91)
    return machine


def test_a_key_that_is_due_is_rotated_and_in_the_escrow(due):
    log = due.rotates()
    key = due.key()
    assert (key["generation"], key["data"]) == (2, DATA)
    generated = due.escrowed(2)
    assert KEY.fullmatch(generated)
    assert [due.volume.opens(secret) for secret in (generated, BACKUP, OLD)] == [True, False, True]
    assert f"{ESCROW} has got the new key" in log
    assert generated.decode() not in log
    assert OLD.decode() not in log
    shown = due.container.show(due.service)
    assert (shown["Result"], shown["ActiveState"]) == ("success", "inactive")
    assert "is not due" in due.rotates(), "it is new now"
    assert due.key()["generation"] == 2


def test_a_key_that_is_not_due_is_left_alone(machine):
    machine.rotated_ago(days=89)
    before = machine.volume.headers()
    assert "is not due" in machine.rotates()
    assert (machine.volume.headers(), machine.escrowed(2)) == (before, b"")


def test_the_age_is_the_administrators(machine):
    machine.rotated_ago(days=8)
    machine.container.put(machine.conf, "AGE=1w\nOPTIONS=--name=backup --pbkdf=pbkdf2 --pbkdf-force-iterations=2000\n")
    machine.rotates()
    [keyslot] = machine.key()["keyslots"]
    assert machine.volume.metadata()["keyslots"][keyslot]["kdf"]["iterations"] == 2000


def test_an_escrow_that_fails_leaves_the_volume_and_a_failed_unit(due):
    before = due.volume.headers()
    due.container.put(ESCROW, FAILS, 0o755)
    log = due.rotates(status=1)
    assert "the vault is shut" in log
    assert "its exit status is 1" in log
    shown = due.container.show(due.service)
    assert (shown["Result"], shown["ExecMainStatus"], shown["ActiveState"]) == ("exit-code", "1", "failed")
    assert due.volume.headers() == before
    assert not due.volume.opens(due.escrowed(2))


def test_without_an_escrow_nothing_is_rotated(due):
    before = due.volume.headers()
    due.run("rm", ESCROW)
    assert "cannot use the escrow command" in due.rotates(status=1)
    assert due.volume.headers() == before


def test_a_credential_of_another_volume_is_not_taken(due):
    """Its name is sealed with it."""
    before = due.volume.headers()
    due.run("mv", due.credential, f"{due.credential}.right")
    other = due.credential.replace(due.volume.uuid, "0b7d65a2-0000-4000-8000-00000000000a")
    due.run("systemd-creds", "encrypt", "-", other, input=OLD.decode())
    due.run("mv", other, due.credential)
    assert due.run("systemctl", "start", due.service, check=False).returncode != 0
    due.run("mv", f"{due.credential}.right", due.credential)
    assert (due.volume.headers(), due.escrowed(2)) == (before, b"")


def test_without_a_credential_no_key_is_made(due):
    before = due.volume.headers()
    due.run("mv", due.credential, f"{due.credential}.away")
    assert "cannot open key file" in due.rotates(status=1)
    due.run("mv", f"{due.credential}.away", due.credential)
    assert (due.volume.headers(), due.escrowed(2)) == (before, b"")


def test_a_token_in_place_of_the_credential(due):
    """The volume is asked for one that opens it, and not for the credential; it has none."""
    due.container.put(due.conf, "UNLOCK=--token=any\n")
    before, log = due.volume.headers(), due.rotates(status=1)
    assert "token" in log
    assert "key file" not in log
    assert due.volume.headers() == before


def test_who_comes_in_between_is_waited_out(due):
    """Status 6: again in ten minutes; here somebody changes the volume while the escrow is at it."""
    changes = f"luksrotctl set-data UUID={due.volume.uuid} --data '{{\"meanwhile\": 1}}' >&2\n"
    due.container.put(ESCROW, f"{TAKES}{changes}", 0o755)
    due.run("systemctl", "start", "--no-block", due.service)
    until(lambda: due.container.show(due.service)["SubState"] in ("auto-restart", "failed"), "it has ended")
    shown = due.container.show(due.service)
    assert (shown["SubState"], shown["RestartUSec"]) == ("auto-restart", "10min")
    assert (shown["ExecMainStatus"], due.key()["generation"], due.key()["data"]) == ("6", 1, {"meanwhile": 1})
    due.run("systemctl", "stop", due.service)
    due.container.put(ESCROW, TAKES, 0o755)
    due.rotates()
    assert due.key()["generation"] == 2


def test_what_needs_a_person_is_shown_as_failed(due):
    makeimage.import_token(due.volume.node, {**due.key(), "keyslots": ["0"]}, 7)  # two keys of that name
    before = due.volume.headers()
    due.rotates(status=1)
    assert due.container.show(due.service)["ExecMainStatus"] == "3"
    assert (due.volume.headers(), due.escrowed(2)) == (before, b"")


def test_the_escrow_is_confined(due):
    """It gets the network, and the folder for its state; no volume, no right of root's, and nothing else to write."""
    probes = {
        "caps": "grep CapEff /proc/self/status",
        "volume": f"head -c 1 {due.volume.node} || echo denied",
        "etc": "touch /etc/luksrotd/x || echo denied",
        "home": "ls /root || echo denied",
        "memory": "cat /proc/1/environ || echo denied",
        "network": "readlink /proc/self/ns/net",
    }
    tries = "".join(f"({probe}) >$STATE_DIRECTORY/{name} 2>/dev/null\n" for name, probe in probes.items())
    due.container.put(ESCROW, f"{TAKES}{tries}", 0o755)
    due.rotates()
    found = {name: due.run("cat", f"{STATE}/{name}").stdout.strip() for name in probes}
    network = due.run("readlink", "/proc/1/ns/net").stdout.strip()
    assert found == {
        "caps": "CapEff:\t0000000000000000",
        "volume": "denied",
        "etc": "denied",
        "home": "denied",
        "memory": "denied",
        "network": network,
    }
    assert due.run("stat", "-c", "%a %U", STATE).stdout == "700 root\n"
    assert due.run("stat", "-c", "%a %U", f"{STATE}/key-2").stdout == "600 root\n"


def test_nothing_runs_on_the_battery(due):
    """A machine with a battery and a power supply that is pulled."""
    before = due.volume.headers()
    due.run("sh", "-ec", POWER)
    try:
        assert "ConditionACPower=true" in due.rotates()
        assert due.volume.headers() == before
        due.container.put("/run/power/AC/online", "1\n")
        due.rotates()
        assert due.key()["generation"] == 2
    finally:
        due.run("umount", "/sys/class/power_supply")


def test_the_timer(machine):
    machine.rotated_ago(days=1)
    machine.run("systemctl", "enable", "--now", machine.timer)
    shown = machine.container.show(machine.timer)
    assert shown["ActiveState"] == "active"
    assert shown["Unit"] == machine.service
    assert "OnCalendar=*-*-* 00/6:00:00" in shown["TimersCalendar"]
    assert shown["RandomizedDelayUSec"] == "2h"
    assert (shown["Persistent"], shown["FixedRandomDelay"]) == ("yes", "no")
    assert shown["NextElapseUSecRealtime"]
    machine.run("test", "-L", f"/etc/systemd/system/timers.target.wants/{machine.timer}")
    machine.run("systemctl", "disable", "--now", machine.timer)


def test_the_timer_catches_up(due):
    """Persistent: the time at which it should have asked is long past, the machine was off."""
    stamp = f"/var/lib/systemd/timers/stamp-{due.timer}"
    due.run("touch", "-d", "2 days ago", stamp)
    drop_in = f"/run/systemd/system/{due.timer}.d/50-test.conf"
    due.container.put(drop_in, "[Timer]\nRandomizedDelaySec=0\nAccuracySec=1us\n")
    due.run("systemctl", "daemon-reload")
    due.run("systemctl", "start", due.timer)
    until(lambda: due.key()["generation"] == 2, "the key is rotated")
    due.run("systemctl", "stop", due.timer)
    due.run("rm", drop_in)
    due.run("systemctl", "daemon-reload")


def test_systemd_has_nothing_to_complain_of(machine):
    verified = machine.run("systemd-analyze", "verify", "--man=no", machine.service, machine.timer)
    assert "luksrotd" not in verified.stderr
    machine.run("systemd-analyze", "security", f"--threshold={EXPOSURE}", machine.service)
