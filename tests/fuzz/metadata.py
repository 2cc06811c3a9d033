# SPDX-License-Identifier: GPL-2.0-or-later
"""Target: the text of the JSON area.  An input is the text; the header around it gets the right checksum."""

import atheris

with atheris.instrument_imports(include=["luksrotd"]):
    from tests.fuzz import driver, volumes
    from tests.support import forge, hostile


def check(data: bytes) -> None:
    """The text alone, and in both copies of a header."""
    hostile.check_text(data + b"\0")
    image = forge.with_text(volumes.VOLUMES[0], data)
    hostile.check_header(image, len(image))


if __name__ == "__main__":
    driver.run(check, map(forge.text_of, volumes.VOLUMES), driver.mutate_json)
