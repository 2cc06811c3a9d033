# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine loses its power in the middle of a rotation; ``make vm-kill`` does that hundreds of times."""

import random

from tests.installed.vm.kill_loop import cut_power


def test_a_rotation_that_lost_its_power_is_reconciled(disk):
    chance = random.Random(4711)
    for _ in range(3):
        cut_power("bookworm", disk, chance)
