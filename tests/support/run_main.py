# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's own command line, for ``tests.support.unprivileged``."""

import sys
from collections.abc import Sequence

from luksrotd.__main__ import main as daemon_main


def main(arguments: Sequence[str]) -> None:
    """Run it."""
    sys.exit(daemon_main(arguments))
