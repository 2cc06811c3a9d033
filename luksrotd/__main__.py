# SPDX-License-Identifier: GPL-2.0-or-later
"""``luksrotd``: the daemon's command line."""

import argparse
import sys
from collections.abc import Sequence

from luksrotd import __version__, daemon


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon; the exit status: 0 stopped, 1 failed, 2 usage, 78 configuration."""
    parser = argparse.ArgumentParser(
        prog="luksrotd",
        description="D-Bus service that changes LUKS2 keyslots and tokens in transactions. "
        "Started by systemd; luksrotctl is its client.",
    )
    parser.add_argument("--version", action="version", version=f"luksrotd {__version__}")
    parser.add_argument(
        "--check-config", action="store_true", help="say what is wrong with the configuration, and exit: 0, or 78"
    )
    parsed = parser.parse_args(arguments)
    return daemon.check_config() if parsed.check_config else daemon.launch()


if __name__ == "__main__":
    sys.exit(main())
