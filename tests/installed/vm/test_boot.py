# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine boots with our package, a person works with it, and it boots again."""

import pytest

from tests.beds import roots
from tests.beds.machine import DISK_BYTES, booted, restored
from tests.installed.vm.test_in_use import CLOSED, MOUNTED, REOPENED
from tests.installed.vm.volumes import FILES, KEYS, SMALL, cut_out, kit, make_volume, opens, place, put
from tests.support.makeimage import make_image

UNITS = """
systemctl --failed --no-legend | tee failed
[ ! -s failed ]
systemctl is-active luksrotd.service luksrotd-reconcile.service
of() { systemctl show --property "$2" --value "$1"; }
[ "$(of luksrotd-reconcile.service Result)" = success ]
reconciled=$(of luksrotd-reconcile.service ExecMainExitTimestampMonotonic)
started=$(of luksrotd.service ExecMainStartTimestampMonotonic)
[ 0 -lt "$reconciled" ]
[ "$reconciled" -lt "$started" ]
busctl status org.luksrotd1 >/dev/null
"""
AS_A_USER = r"""
useradd --create-home alice
as_alice() { runuser --user alice -- "$@"; }
path=$(volume /dev/vdb)
as_alice busctl get-property org.luksrotd1 "$path" org.luksrotd1.Device Generation
! as_alice busctl call org.luksrotd1 "$path" org.luksrotd1.Device SetData 'ssa{sv}' backup '{}' 0 2>refused
grep -i authoriz refused
cat >/etc/polkit-1/rules.d/10-alice.rules <<END
polkit.addRule(function (action, subject) {
    if (action.id.startsWith("org.luksrotd1.set-data") && subject.user == "alice") {
        return polkit.Result.YES;
    }
});
END
# As soon as polkitd has seen the rule.
patiently as_alice busctl call org.luksrotd1 "$path" org.luksrotd1.Device SetData 'ssa{sv}' backup '{"by": "alice"}' 0
"""


@pytest.fixture
def disk(tmp_path):
    """A disk with a volume that nobody has enrolled yet."""
    return make_image(tmp_path / "disk", key=KEYS["old"], size=DISK_BYTES)


@pytest.mark.parametrize("release", roots.RELEASES)
def test_a_machine_boots_works_and_boots_again(release, disk):
    with booted(release, disk=disk) as machine:
        script = f"""{UNITS}
        {MOUNTED}
        done_well $(start Enroll /dev/vdb old backup)
        opens /dev/vdb backup
        {AS_A_USER}
        rotate /dev/vdb backup new
        {CLOSED}"""
        machine.check(kit(script), FILES)
        machine.reboot()
        machine.check(kit(f"{UNITS}\n! opens /dev/vdb backup\n{REOPENED}"), FILES)
    assert opens(disk, KEYS["new"])
    assert opens(disk, KEYS["old"])
    assert not opens(disk, KEYS["backup"])


HANG = f"""
cat >/etc/systemd/system/hang.service <<'END'
[Unit]
Requires=dev-vdb.device
After=dev-vdb.device systemd-udev-trigger.service
Before=luksrotd-reconcile.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=dmsetup create hung --table "0 {SMALL // 512} linear /dev/vdb {place(0) // 512}"
ExecStart=dmsetup create well --table "0 {SMALL // 512} linear /dev/vdb {place(1) // 512}"
ExecStart=udevadm settle --timeout=60
ExecStart=dmsetup suspend --nolockfs --noflush hung
[Install]
RequiredBy=luksrotd-reconcile.service
END
mkdir /etc/systemd/system/luksrotd-reconcile.service.d
cat >/etc/systemd/system/luksrotd-reconcile.service.d/soon.conf <<'END'
[Service]
TimeoutStartSec=30s
TimeoutStopSec=3s
END
systemctl enable hang.service
"""
BOOTED_ALL_THE_SAME = """
systemctl is-active multi-user.target hang.service luksrotd.service
dmsetup info hung | grep SUSPENDED
luksrotctl --direct show /dev/mapper/well
journalctl --no-pager --unit luksrotd-reconcile.service
dmsetup resume hung
clean_both() { [ "$(reconcile true | grep --only-matching ' 0 0 ""' | wc --lines)" = 2 ]; }
volume /dev/mapper/hung
volume /dev/mapper/well
patiently clean_both
"""


def test_a_device_that_hangs_at_boot_holds_up_neither_the_boot_nor_other_volumes(tmp_path):
    volumes = [make_volume(tmp_path / name, SMALL) for name in ("hung", "well")]
    for volume in volumes:  # the secondary header is lost
        with volume.open("r+b") as file:
            file.seek(16384)
            file.write(bytes(16384))
    disk = tmp_path / "disk"
    put(disk, volumes)
    with restored("bookworm", disk=disk) as machine:
        machine.check(HANG)
        machine.reboot()
        said = machine.check("journalctl --no-pager --unit luksrotd-reconcile.service --unit luksrotd.service")
        healed = cut_out(disk, 1, tmp_path / "now").read_bytes()
        assert healed[16384:16390] == b"SKUL\xba\xbe", said
        machine.check(kit(BOOTED_ALL_THE_SAME), FILES)
    for number in range(2):
        now = cut_out(disk, number, tmp_path / "now")
        assert now.read_bytes()[16384:16390] == b"SKUL\xba\xbe"
        assert opens(now, KEYS["backup"])
