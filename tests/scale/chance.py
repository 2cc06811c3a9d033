# SPDX-License-Identifier: GPL-2.0-or-later
"""What looks random, and is a function of its numbers: the same on every machine, in any order of asking."""

from typing import Final

_MASK: Final = (1 << 64) - 1


def _bits(seed: int, what: int, when: int) -> int:
    """64 bits: the finalizer of splitmix64."""
    x = (seed * 0xD1342543DE82EF95 + what * 0x9E3779B97F4A7C15 + when * 0xC2B2AE3D27D4EB4F + 1) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def draw(below: int, seed: int, what: int, when: int = 0) -> int:
    """A whole number, 0 to ``below`` - 1, for ``what`` (a machine, say) at ``when``."""
    return (_bits(seed, what, when) * below) >> 64


def bell(below: int, seed: int, what: int, when: int = 0) -> int:
    """The same, but most in the middle: four draws, added up."""
    x = _bits(seed, what, when)
    four = (x & 0xFFFF) + (x >> 16 & 0xFFFF) + (x >> 32 & 0xFFFF) + (x >> 48)
    return (four * below) >> 18
