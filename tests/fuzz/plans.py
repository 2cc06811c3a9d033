# SPDX-License-Identifier: GPL-2.0-or-later
"""Target: the planner.  An input is a series of choices: a change, and how its shadow is not what it should be."""

import atheris

with atheris.instrument_imports(include=["luksrotd"]):
    from tests.fuzz import driver
    from tests.support import shadows

CASES = shadows.cases()


def check(data: bytes) -> None:
    """Choose a change, alter its shadow, and plan it."""
    choices = driver.Choices(data)
    case = choices.choice(CASES)
    shadows.check_plan(case, shadows.altered_shadow(choices, case))


if __name__ == "__main__":
    driver.run(check, driver.some_choices())
