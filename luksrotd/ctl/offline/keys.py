# SPDX-License-Identifier: GPL-2.0-or-later
"""Other changes of managed keys."""

from luksrotd.ctl.arguments import Verbs


def add(verbs: Verbs) -> None:
    """None yet."""
