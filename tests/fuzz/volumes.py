# SPDX-License-Identifier: GPL-2.0-or-later
"""The good volumes that fuzzing starts from."""

from typing import Final

from luksrotd.luks2.areas import Extent
from luksrotd.luks2.jsontext import DEPTH_MAX
from luksrotd.rotation import token as tokens
from tests.support import forge
from tests.support.planning import KEEP, OLD, volume
from tests.support.simengine import HDR_SIZE, make_volume

RECOVERY: Final = {"type": "systemd-recovery", "keyslots": ["0"]}
FREED: Final = Extent(45056, 4096)


def _staged() -> bytes:
    image = forge.with_token(make_volume([KEEP, OLD, b"new"]), 1, 0)
    return forge.with_token(
        image, 2, 1, generation=2, state="staged", expires_at="2026-09-09T09:09:09Z", group={"id": "set", "size": 2}
    )


def _stepwise() -> bytes:
    image = forge.with_token(make_volume([KEEP, OLD, b"new"]), 1, 0)
    return forge.with_token(image, 2, 1, generation=2, retires=["0"], adopted=RECOVERY)


def _crashed() -> bytes:
    """The secondary copy is newer, and says something else."""
    return forge.put(volume(), HDR_SIZE, forge.newer(_staged(), forge.BOTH)[HDR_SIZE : 2 * HDR_SIZE])


def _deep() -> bytes:
    """As deep as json-c reads."""
    data: dict[str, object] = {}
    for _ in range(DEPTH_MAX - 4):
        data = {"a": data}
    return forge.with_token(volume(), 1, data=data)


def _foreign() -> bytes:
    record = tokens.record([FREED])
    return forge.edited(volume(), lambda raw: raw["tokens"].update({"4": RECOVERY, "5": record}))


VOLUMES: Final = (
    volume(),
    forge.with_token(volume(), 0, 3, name="spare", wipe=forge.intent(FREED)),
    forge.keyslot_removed(volume(), 1),
    _staged(),
    _stepwise(),
    _foreign(),
    _crashed(),
    # Another tool has put its keys where a retired one waited to be wiped.
    forge.with_token(volume(), 1, wipe=forge.intent(Extent(32768, 16384))),
    _deep(),
)
