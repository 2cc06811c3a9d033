# SPDX-License-Identifier: GPL-2.0-or-later
"""Target: whole devices.  An input is a series of choices of what is altered in a good one."""

import atheris

with atheris.instrument_imports(include=["luksrotd"]):
    from tests.fuzz import driver, volumes
    from tests.support import hostile, mutation


def check(data: bytes) -> None:
    """Choose a volume, alter it, and cut it perhaps."""
    choices = driver.Choices(data)
    image = mutation.altered(choices, choices.choice(volumes.VOLUMES))
    size = choices.choice((len(image), len(image), 64 * 512 * choices.randrange(1, 5)))
    hostile.check_header(image, size)


if __name__ == "__main__":
    driver.run(check, driver.some_choices())
