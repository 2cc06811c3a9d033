# SPDX-License-Identifier: GPL-2.0-or-later
"""Keyslots that have appeared without a token."""

from luksrotd.ctl.arguments import Verbs


def add(verbs: Verbs) -> None:
    """None yet."""
