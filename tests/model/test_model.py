# SPDX-License-Identifier: GPL-2.0-or-later
"""Any sequence of verbs, strangers and accidents: ``machine.Volume`` has the rules and what must hold."""

from hypothesis import settings

from tests.model.machine import Volume

#: The profile "soak" (make soak) says how many; else few enough for every run.
EXAMPLES = settings.default.max_examples if settings.default.max_examples > 100 else 40

TestSimulated = Volume.TestCase
TestSimulated.settings = settings(max_examples=EXAMPLES, stateful_step_count=15)
