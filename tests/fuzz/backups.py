# SPDX-License-Identifier: GPL-2.0-or-later
"""Target: files that a header is restored from.  An input is a series of choices."""

import atheris

with atheris.instrument_imports(include=["luksrotd"]):
    from tests.fuzz import driver, volumes
    from tests.support import hostile, mutation


def check(data: bytes) -> None:
    """Choose a volume and a backup of it or of another state of it, and alter that."""
    choices = driver.Choices(data)
    image, other = choices.choice(volumes.VOLUMES), choices.choice(volumes.VOLUMES)
    hostile.check_backup(image, mutation.altered(choices, other))


if __name__ == "__main__":
    driver.run(check, driver.some_choices())
