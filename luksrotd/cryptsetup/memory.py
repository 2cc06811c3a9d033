# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory for secrets: never a ``bytes`` or ``str``, locked into RAM as far as the limit allows, wiped when freed."""

from types import TracebackType
from typing import Any, Self

from luksrotd.cryptsetup._ffi import ffi, lib
from luksrotd.errors import EngineError


class SafeMemory:
    """``size`` bytes from crypt_safe_alloc, zeroed; freed (and wiped) by ``close``, at the latest with the object."""

    __slots__ = ("_address", "size")

    def __init__(self, size: int) -> None:
        self._address: Any = ffi.NULL
        self._address = lib.crypt_safe_alloc(size)
        if not self._address:
            raise EngineError(f"cannot allocate {size} bytes of safe memory")
        self.size = size

    @property
    def address(self) -> Any:
        """The ``char *`` to hand to libcryptsetup; valid until ``resize`` or ``close``."""
        if not self._address:
            raise ValueError("the memory was freed")
        return ffi.cast("char *", self._address)

    def view(self, start: int = 0, end: int | None = None) -> memoryview:
        """The bytes ``[start, end)`` in place, writable, for ``os.readv`` and ``os.write``; valid as ``address`` is."""
        end = self.size if end is None else end
        if not 0 <= start <= end <= self.size:
            raise ValueError(f"not inside {self.size} bytes: {start} to {end}")
        return memoryview(ffi.buffer(self.address + start, end - start))

    def resize(self, size: int) -> None:
        """Keep the first ``size`` bytes; where they move, the old place is wiped.  Raises ``EngineError``."""
        moved = lib.crypt_safe_realloc(self._address, size)
        if not moved:
            raise EngineError(f"cannot allocate {size} bytes of safe memory")
        self._address, self.size = moved, size

    def wipe(self) -> None:
        """Overwrite every byte with zero."""
        lib.crypt_safe_memzero(self.address, self.size)

    def close(self) -> None:
        """Wipe and free; idempotent."""
        address, self._address, self.size = self._address, ffi.NULL, 0
        if address:
            lib.crypt_safe_free(address)

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"<SafeMemory of {self.size} bytes>"

    def __reduce__(self) -> str:
        raise TypeError("safe memory cannot be pickled")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
