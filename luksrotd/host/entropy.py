# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's random numbers."""

import os


class KernelEntropy:
    """``ports.Entropy`` by getrandom(2)."""

    def random(self, length: int) -> bytes:
        """``length`` random bytes; waits for the kernel's generator to be seeded, early at boot."""
        parts: list[bytes] = []
        while length > 0:
            part = os.getrandom(length)  # large requests may be answered in part
            parts.append(part)
            length -= len(part)
        return b"".join(parts)
