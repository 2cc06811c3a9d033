# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks that are plugged in, and pulled in the middle of a rotation."""

from tests.beds.machine import restored
from tests.installed.vm.volumes import FILES, KEYS, kit, opens

NODE = "/dev/disk/by-id/virtio-STICK"


def test_a_disk_is_pulled_while_its_key_is_rotated_and_comes_back(disk):
    with restored("bookworm") as machine:
        machine.plug(disk, "STICK")
        script = f"""
        patiently test -e {NODE}
        job=$(start Rotate {NODE} backup new "$slow")
        held $job
        volume {NODE} >/run/path
        echo $job"""
        job = machine.check(kit(script), FILES).strip()
        machine.unplug("STICK")
        told = machine.check(kit(f"goes_on {job}\nended {job}"), FILES)
        state, outcome, error, message = told.splitlines()[:4]
        assert (state, outcome) == ('s "failed"', 's "unchanged"'), told
        assert error.startswith('s "org.luksrotd1.Error.'), told
        assert message.startswith('s "cannot '), told
        script = """
        forgotten() { ! busctl --list tree org.luksrotd1 | grep --quiet "$(cat /run/path)"; }
        patiently forgotten
        ! journalctl --unit luksrotd | grep Traceback"""
        machine.check(kit(script), FILES)
        assert opens(disk, KEYS["backup"])
        assert not opens(disk, KEYS["new"])

        machine.plug(disk, "STICK")
        script = f"""
        patiently test -e {NODE}
        clean {NODE}
        rotate {NODE} backup new
        clean {NODE}
        systemctl is-active luksrotd"""
        machine.check(kit(script), FILES)
    assert opens(disk, KEYS["new"])
    assert not opens(disk, KEYS["backup"])
