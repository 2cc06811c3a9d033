# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's random numbers."""

import os


class KernelEntropy:
    """``ports.Entropy`` by getrandom(2)."""

    def random(self, length: int) -> bytes:
        """``length`` random bytes; waits for the kernel's generator to be seeded, early at boot (PEP 524)."""
        return os.urandom(length)
