# SPDX-License-Identifier: GPL-2.0-or-later
"""Overwriting of unreferenced keyslot space."""

from luksrotd.ctl.arguments import Verbs


def add(verbs: Verbs) -> None:
    """None yet."""
