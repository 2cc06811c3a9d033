# SPDX-License-Identifier: GPL-2.0-or-later
"""Rotations of volumes that are in use: mapped, mounted and written to, resized, suspended, as swap."""

from tests.beds.machine import restored
from tests.installed.vm.volumes import FILES, KEYS, kit, opens

MOUNTED = """
cryptsetup open --key-file old /dev/vdb data
mkfs.ext4 -q /dev/mapper/data
mount /dev/mapper/data /mnt
write_without_end /mnt
writer=$!
"""
CLOSED = """
kill $writer || true
wait $writer || true
all_right /mnt
umount /mnt
cryptsetup close data
"""
REOPENED = """
cryptsetup open --key-file new /dev/vdb data
e2fsck -fn /dev/mapper/data
mount /dev/mapper/data /mnt
all_right /mnt
umount /mnt
cryptsetup close data
clean /dev/vdb
"""


def rotated(disk):
    """Whether the new key is in, the managed one out, and the other one as it was."""
    return opens(disk, KEYS["new"]) and not opens(disk, KEYS["backup"]) and opens(disk, KEYS["old"])


def test_a_volume_is_rotated_while_it_is_mounted_and_written_to(disk):
    with restored("bookworm", disk=disk) as machine:
        machine.check(kit(f"{MOUNTED}\nrotate /dev/vdb backup new\n{CLOSED}\n{REOPENED}"), FILES)
    assert rotated(disk)


RESIZED = """
size() { blockdev --getsz /dev/mapper/data; }
cryptsetup open --key-file old /dev/vdb data
whole=$(size)
mkfs.ext4 -q /dev/mapper/data 32M
cryptsetup resize --key-file old --size 65536 data
job=$(start Rotate /dev/vdb backup new "$slow")
held $job
cryptsetup resize --key-file old --size 81920 data
[ "$(size)" = 81920 ]
goes_on $job
done_well $job
! cryptsetup resize --key-file backup data
cryptsetup resize --key-file new data
[ "$(size)" = "$whole" ]
e2fsck -fn /dev/mapper/data
"""
SUSPENDED = """
mount /dev/mapper/data /mnt
write_without_end /mnt
writer=$!
patiently all_right /mnt
cryptsetup luksSuspend data
job=$(start Rotate /dev/vdb new backup "$slow")
held $job
cryptsetup luksResume --key-file new data
cryptsetup luksSuspend data
goes_on $job
done_well $job
! cryptsetup luksResume --key-file new data
cryptsetup luksResume --key-file backup data
kill $writer || true
wait $writer || true
all_right /mnt
umount /mnt
cryptsetup close data
"""
#: A process keeps more than the memory that it may have, and reads it again after the rotation.
SWAP = """
cryptsetup open --key-file old /dev/vdb swap
mkswap --quiet /dev/mapper/swap
swapon /dev/mapper/swap
cat >keep.py <<'END'
import sys
kept = b"kept " * (8 << 20)
print("full", flush=True)
sys.stdin.read()
sys.exit(kept.count(b"kept ") != 8 << 20)
END
mkfifo hold
systemd-run --quiet --scope --property MemoryMax=24M python3 keep.py <hold >filled &
keeper=$!
exec 3>hold
patiently test -s filled
[ "$(awk '/swap|dm-/ { print $4 }' /proc/swaps)" -gt 0 ]
rotate /dev/vdb backup new
exec 3>&-
wait $keeper
swapoff /dev/mapper/swap
cryptsetup close swap
cryptsetup open --key-file new /dev/vdb swap
swapon /dev/mapper/swap
swapoff /dev/mapper/swap
clean /dev/vdb
"""


def test_a_volume_is_resized_and_suspended_and_is_swap_next_to_a_rotation(disk):
    with restored("bookworm", disk=disk) as machine:
        for script in (RESIZED, SUSPENDED, SWAP):
            machine.check(kit(script), FILES)
    assert rotated(disk)


def test_a_machine_sleeps_while_a_key_is_derived_and_while_it_is_staged(disk):
    with restored("bookworm", disk=disk) as machine:
        script = f"""{MOUNTED}
        job=$(start Stage /dev/vdb backup new "$slow")
        held $job
        echo $writer >/run/writer
        echo $job"""
        job = machine.check(kit(script), FILES).splitlines()[-1]
        machine.sleep()
        machine.check(kit(f"goes_on {job}\ndone_well {job}\nopens /dev/vdb backup\nopens /dev/vdb new"), FILES)
        machine.sleep()
        script = f"""
        all_right /mnt
        done_well $(start_plain Finish /dev/vdb)
        kill $(cat /run/writer) || true
        patiently umount /mnt
        cryptsetup close data
        {REOPENED}"""
        machine.check(kit(script), FILES)
    assert rotated(disk)
