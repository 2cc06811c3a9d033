# SPDX-License-Identifier: GPL-2.0-or-later
"""Target: our tokens.  An input is the JSON text of the object "tokens"; the rest of the header is good."""

import json

import atheris

with atheris.instrument_imports(include=["luksrotd"]):
    from tests.fuzz import driver, volumes
    from tests.support import forge, hostile


def check(data: bytes) -> None:
    """Each token alone, and all of them on a volume."""
    try:
        tokens = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(tokens, dict):
        return
    for token in tokens.values():
        if isinstance(token, dict):
            hostile.check_token(token)
    image = forge.edited(volumes.VOLUMES[0], lambda raw: raw.update(tokens=tokens))
    hostile.check_header(image, len(image))


if __name__ == "__main__":
    seeds = [json.dumps(forge.json_of(image)["tokens"]).encode() for image in volumes.VOLUMES]
    driver.run(check, seeds, driver.mutate_json)
