# SPDX-License-Identifier: GPL-2.0-or-later
"""Any sequence of verbs, strangers and accidents: ``machine.Volume`` has the rules and what must hold."""

from hypothesis import settings

from tests.model.machine import Volume
from tests.model.real import RealVolume

#: The profile "soak" (make soak) says how many; else few enough for every run.
EXAMPLES = settings.default.max_examples if settings.default.max_examples > 100 else 40

#: A step of the real one takes a second.
REAL_EXAMPLES = EXAMPLES // 10 if EXAMPLES > 100 else 6

TestSimulated = Volume.TestCase
TestSimulated.settings = settings(max_examples=EXAMPLES, stateful_step_count=15)

TestReal = RealVolume.TestCase
TestReal.settings = settings(max_examples=REAL_EXAMPLES, stateful_step_count=10)
