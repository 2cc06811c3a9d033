# SPDX-License-Identifier: GPL-2.0-or-later
"""How much memory a job may need, as far as the header tells.  Pure."""

from typing import Final

from luksrotd.luks2.metadata import Keyslot
from luksrotd.rotation.edits import Pbkdf
from luksrotd.rotation.view import DeviceView, Summary

#: What argon2 takes for a new keyslot where nobody says how much: at most this (DEFAULT_LUKS2_MEMORY_KB, and lib/
#: utils_pbkdf.c: adjusted_phys_memory).  libcryptsetup lowers it, and what is asked for, to half of the machine's
#: memory; that is not counted on here, for it makes no difference: two times half is more than any budget.
DEFAULT_KIB: Final = 1024 * 1024
#: The worker itself: Python, libcryptsetup (some 20 MiB), and the keyslot areas in its memfd.
WORKER_KIB: Final = 64 * 1024


def needed_kib(view: DeviceView | Summary | None, *new: Pbkdf) -> int:
    """KiB that a job needs at its worst moment, if it may open any keyslot of the volume and adds ``new`` ones.

    A worker derives one key after the other, so that is the most that one of them takes, and the worker.  The header
    may claim any number.  ``view`` of ``None``: not known, taken to be libcryptsetup's default.
    """
    there = [DEFAULT_KIB] if view is None else [_of_keyslot(keyslot) for keyslot in view.metadata.keyslots.values()]
    return WORKER_KIB + max((*there, *map(_of_new, new)), default=0)


def _of_keyslot(keyslot: Keyslot) -> int:
    if keyslot.kdf_salt is None:
        return 0
    memory: int = keyslot.raw["kdf"].get("memory", 0)  # pbkdf2 has none
    return memory


def _of_new(pbkdf: Pbkdf) -> int:
    if pbkdf.type == "pbkdf2":
        return 0
    return DEFAULT_KIB if pbkdf.memory_kib is None else pbkdf.memory_kib
