# SPDX-License-Identifier: GPL-2.0-or-later
"""Shadows without a descriptor, for engines that are simulated too."""

from luksrotd.errors import EngineError, Internal
from luksrotd.luks2.areas import Extent, merge

PAGE = 4096
"""Bytes; as sparse as a memfd is."""


class SimShadow:
    """``ports.Shadow`` over a dictionary of pages; ``fd`` is -1: there is none."""

    def __init__(self, length: int) -> None:
        self.closed = False
        self._length = length
        self._pages: dict[int, bytearray] = {}

    @property
    def fd(self) -> int:
        """Always -1."""
        return -1

    @property
    def length(self) -> int:
        """Bytes."""
        return self._length

    def write(self, offset: int, data: bytes) -> None:
        """Write all of ``data``."""
        self._check(offset, len(data))
        done = 0
        while done < len(data):
            number, start = divmod(offset + done, PAGE)
            part = data[done : done + PAGE - start]
            self._pages.setdefault(number, bytearray(PAGE))[start : start + len(part)] = part
            done += len(part)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes."""
        self._check(offset, length)
        first, last = offset // PAGE, (offset + length + PAGE - 1) // PAGE
        pages = b"".join(bytes(self._pages.get(number, bytes(PAGE))) for number in range(first, last))
        return pages[offset - first * PAGE :][:length]

    def clear(self) -> None:
        """Make it all zeros again."""
        for page in self._pages.values():
            page[:] = bytes(PAGE)

    def data_extents(self) -> tuple[Extent, ...]:
        """Ranges of pages that were written to."""
        return merge(Extent(number * PAGE, min(PAGE, self._length - number * PAGE)) for number in self._pages)

    def close(self) -> None:
        """Close; idempotent."""
        self.closed = True
        self._pages.clear()

    def _check(self, offset: int, length: int) -> None:
        if self.closed:
            raise Internal("cannot use a shadow: closed")
        if offset < 0 or length < 0 or offset + length > self._length:
            raise Internal(f"cannot use a shadow of {self._length} bytes at {offset}: {length} bytes do not fit")


class SimShadows:
    """``ports.ShadowStore``; remembers what it made.  ``exhausted``: there is no memory for another one."""

    def __init__(self) -> None:
        self.created: list[SimShadow] = []
        self.exhausted = False

    def create(self, length: int) -> SimShadow:
        """A shadow of zeros."""
        if length <= 0:
            raise Internal(f"cannot create a shadow of {length} bytes")
        if self.exhausted:
            raise EngineError(f"cannot create a shadow of {length} bytes: Cannot allocate memory")
        shadow = SimShadow(length)
        self.created.append(shadow)
        return shadow

    @property
    def leaked(self) -> tuple[SimShadow, ...]:
        """Shadows that were made and never closed."""
        return tuple(shadow for shadow in self.created if not shadow.closed)
