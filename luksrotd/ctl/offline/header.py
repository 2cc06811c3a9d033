# SPDX-License-Identifier: GPL-2.0-or-later
"""Backup and restore of the header."""

from luksrotd.ctl.arguments import Verbs


def add(verbs: Verbs) -> None:
    """None yet."""
