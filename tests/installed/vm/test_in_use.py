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
kill $writer
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


def test_a_volume_is_resized_before_during_and_after_a_rotation(disk):
    with restored("bookworm", disk=disk) as machine:
        machine.check(
            kit(f"""{MOUNTED}
            size() {{ blockdev --getsz /dev/mapper/data; }}
            whole=$(size)
            kill $writer
            umount /mnt
            cryptsetup resize --key-file old --size 65536 data
            job=$(start Rotate /dev/vdb backup new "$slow")
            derives $job
            cryptsetup resize --key-file old --size 81920 data
            [ "$(size)" = 81920 ]
            [ "$(of_job $job State)" = 's "running"' ]
            done_well $job
            cryptsetup resize --key-file new data
            [ "$(size)" = "$whole" ]
            mount /dev/mapper/data /mnt
            all_right /mnt
            umount /mnt
            cryptsetup close data
            {REOPENED}"""),
            FILES,
        )
    assert rotated(disk)


def test_a_volume_is_suspended_and_resumed_around_a_rotation(disk):
    with restored("bookworm", disk=disk) as machine:
        machine.check(
            kit(f"""{MOUNTED}
            cryptsetup luksSuspend data
            rotate /dev/vdb backup new
            ! cryptsetup luksResume --key-file backup data
            cryptsetup luksResume --key-file new data
            all_right /mnt
            job=$(start Rotate /dev/vdb new backup "$slow")
            derives $job
            cryptsetup luksSuspend data
            [ "$(of_job $job State)" = 's "running"' ]
            cryptsetup luksResume --key-file new data
            cryptsetup luksSuspend data
            done_well $job
            cryptsetup luksResume --key-file backup data
            rotate /dev/vdb backup new
            {CLOSED}
            {REOPENED}"""),
            FILES,
        )
    assert rotated(disk)


def test_a_machine_sleeps_in_the_middle_of_a_staged_rotation(disk):
    with restored("bookworm", disk=disk) as machine:
        script = f"""{MOUNTED}
        done_well $(start Stage /dev/vdb backup new)
        opens /dev/vdb backup
        opens /dev/vdb new
        echo $writer >/run/writer"""
        machine.check(kit(script), FILES)
        machine.sleep()
        script = f"""
        all_right /mnt
        done_well $(start_plain Finish /dev/vdb)
        kill $(cat /run/writer)
        while ! umount /mnt; do sleep 0.1; done
        cryptsetup close data
        {REOPENED}"""
        machine.check(kit(script), FILES)
    assert rotated(disk)


def test_a_machine_sleeps_while_a_key_is_derived(disk):
    with restored("bookworm", disk=disk) as machine:
        job = machine.check(kit('job=$(start Rotate /dev/vdb backup new "$slow"); derives $job; echo $job'), FILES)
        machine.sleep()
        machine.check(kit(f"done_well {job}\nclean /dev/vdb"), FILES)
    assert rotated(disk)


def test_swap_is_used_through_a_rotation(disk):
    with restored("bookworm", disk=disk) as machine:
        machine.check(
            kit("""
            cryptsetup open --key-file old /dev/vdb swap
            mkswap --quiet /dev/mapper/swap
            swapon /dev/mapper/swap
            fill() { python3 -c 'import sys; kept = b"x" * (900 << 20); print("full", flush=True); sys.stdin.read()'; }
            mkfifo hold
            fill <hold >filled &
            exec 3>hold
            until [ -s filled ]; do sleep 0.1; done
            [ "$(awk '/swap|dm-/ { print $4 }' /proc/swaps)" -gt 0 ]
            rotate /dev/vdb backup new
            exec 3>&-
            wait
            swapoff /dev/mapper/swap
            cryptsetup close swap
            cryptsetup open --key-file new /dev/vdb swap
            swapon /dev/mapper/swap
            swapoff /dev/mapper/swap
            clean /dev/vdb
            """),
            FILES,
        )
    assert rotated(disk)
