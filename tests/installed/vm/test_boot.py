# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine boots with our package, a person works with it, and it boots again."""

import pytest

from tests.beds import roots
from tests.beds.machine import DISK_BYTES, booted
from tests.installed.vm.test_in_use import CLOSED, MOUNTED, REOPENED
from tests.installed.vm.volumes import FILES, KEYS, kit, opens
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
until as_alice busctl call org.luksrotd1 "$path" org.luksrotd1.Device SetData 'ssa{sv}' backup '{"by": "alice"}' 0; do
    sleep 0.2  # polkitd has not seen the rule
done
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
