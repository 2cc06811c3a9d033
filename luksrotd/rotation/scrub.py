# SPDX-License-Identifier: GPL-2.0-or-later
"""Which unreferenced keyslot space to overwrite, piece by piece (docs/spec/commit-protocol.md, "Scrub").

It is for keys that no record names: what other tools have left, or what was there before the volume was formatted.
"""

from typing import Final

from luksrotd.luks2.areas import Extent, subtract, whole_blocks
from luksrotd.rotation import policy
from luksrotd.rotation.change import Change
from luksrotd.rotation.protocol import BLOCK
from luksrotd.rotation.view import DeviceView

#: Bytes that one transaction overwrites at most: the exclusive metadata lock is held meanwhile.
PIECE_MAX: Final = 4 * 1024 * 1024


def free_blocks(view: DeviceView) -> tuple[Extent, ...]:
    """The blocks of the keyslots area in which neither header copy references a byte, ascending."""
    return subtract(view.metadata.keyslots_area, [whole_blocks(area, BLOCK) for area in view.pair.referenced])


def scrub(view: DeviceView, start: int, limit: int = PIECE_MAX) -> Change:
    """Overwrite the free blocks from byte offset ``start`` on, ``limit`` bytes at most; an empty change at the end.

    No header is written, so the sequence number stays.  Raises a refusal.
    """
    policy.check_writable(view)
    wipe: list[Extent] = []
    for extent in free_blocks(view):
        first = max(extent.offset, start)
        size = min(extent.end - first, limit)
        if size > 0:
            wipe.append(Extent(first, size))
            limit -= size
    return Change(wipe=tuple(wipe))
