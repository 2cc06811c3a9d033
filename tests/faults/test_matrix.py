# SPDX-License-Identifier: GPL-2.0-or-later
"""Every verb, and every fault of its device at each of its writes and flushes in turn."""

import pytest

from tests.faults.matrix import VERBS, disturb, flush_faults, losses, pulls, row, write_faults

KINDS = {"writes": write_faults, "flushes": flush_faults, "lost": losses, "device gone": pulls}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VERBS)
def test_the_outcome_is_true_nothing_is_retried_and_reconcile_brings_it_clean(name, kind):
    wrong = {fault.name: found for fault in KINDS[kind](row(name).log) if (found := disturb(name, fault))}
    assert wrong == {}
