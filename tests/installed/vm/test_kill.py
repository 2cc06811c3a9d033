# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine loses its power in the middle of a rotation; ``make vm-kill`` does that hundreds of times."""

import random

from tests.installed.vm.kill_loop import live


def test_a_rotation_that_lost_its_power_is_reconciled(disk):
    chance = random.Random(4711)
    cut, mended = None, []
    for number in range(3):
        cut, done = live("bookworm", disk, chance, cut, last=number == 2)
        mended += [done] if done else []
    assert [cut.after for cut in mended] != ["nothing", "nothing"]
    assert all(cut.mended_by for cut in mended)
