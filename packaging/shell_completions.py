# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the completions of luksrotctl for bash, zsh and fish out of its parser, into a folder.

    PYTHONPATH=. python3 packaging/shell_completions.py packaging/completions

They are checked in.  Whoever completes runs nothing of luksrotd: no daemon is started, nobody is asked, no key is read
(docs/adr/0027-completions.md).  Volumes are offered as udev knows them.
"""

import sys
from pathlib import Path

from shells.bash import bash
from shells.fish import fish
from shells.verbs import verbs_of
from shells.zsh import zsh

from luksrotd.ctl.cli import build_parser

SHELLS = ("luksrotctl", "_luksrotctl", "luksrotctl.fish")


def made() -> dict[str, str]:
    """The files, by their names."""
    verbs = list(verbs_of(build_parser()))
    return dict(zip(SHELLS, (bash(verbs), zsh(verbs), fish(verbs)), strict=True))


if __name__ == "__main__":
    for name, content in made().items():
        Path(sys.argv[1], name).write_text(content, encoding="utf-8")
