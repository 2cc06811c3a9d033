# SPDX-License-Identifier: GPL-2.0-or-later
"""What is on the volume: each header copy for itself, read with luksrotd.luks2, which never mends what it reads."""

from pathlib import Path

from luksrotd.luks2.areas import Extent
from luksrotd.luks2.layout import BINARY_SIZE, Which
from luksrotd.luks2.pair import BadCopy, HeaderCopy, Pair, parse_pair
from luksrotd.rotation import view
from luksrotd.rotation.token import BackupToken
from tests.demo.screen import Broken, check

SECTOR = 512


class Image:
    """The bytes of the volume at one moment."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.pair: Pair = parse_pair(content)

    @property
    def header(self) -> bytes:
        """Both header copies."""
        return self.pair.raw

    def copy(self, which: Which) -> HeaderCopy:
        """A header copy, which must be valid."""
        copy = self.pair.primary if which is Which.PRIMARY else self.pair.secondary
        if isinstance(copy, BadCopy):
            raise Broken(copy.reason)
        return copy

    def alone(self, which: Which) -> "Image":
        """The volume as it would be if the other header copy were lost."""
        other = 0 if which is Which.SECONDARY else self.pair.hdr_size
        return Image(self.content[:other] + bytes(BINARY_SIZE) + self.content[other + BINARY_SIZE :])

    def with_header_of(self, other: "Image") -> "Image":
        """The volume with the header of another moment."""
        return Image(other.header + self.content[len(other.header) :])

    def token(self) -> BackupToken:
        """The only token of ours, in the copy that counts; it must name exactly one keyslot."""
        keys = view.view(self.pair).keys
        check(len(keys) == 1, f"there are {len(keys)} managed keys, not one")
        check(keys[0].keyslot is not None, "the token does not name exactly one keyslot")
        return keys[0].token

    def area(self) -> Extent:
        """Where the binary area of the managed key is."""
        return self.pair.winner.metadata.keyslots[self.token().keyslots[0]].area

    def in_area(self, area: Extent) -> bytes:
        """What is there."""
        return self.content[area.offset : area.end]


def read(path: Path) -> Image:
    """The volume as it is now."""
    return Image(path.read_bytes())


def sectors_left(before: Image, after: Image, area: Extent) -> int:
    """How many sectors of the area are what they were."""
    old, new = before.in_area(area), after.in_area(area)
    return sum(old[at : at + SECTOR] == new[at : at + SECTOR] for at in range(0, area.size, SECTOR))
