# SPDX-License-Identifier: GPL-2.0-or-later
"""Escrow commands for the tests of --escrow: shell scripts that keep what they get beside themselves."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

#: What a key that luksrotctl has made looks like.
KEY = re.compile(rb"[cbdefghijklnrtuv]{8}(-[cbdefghijklnrtuv]{8}){7}")
DATA: Mapping[str, object] = {"escrow": "vault/é", "seen": 7}
_TAKES = 'cat >"$0.key"\nenv >"$0.env"\n'


class Escrow:
    """A script in a folder of root's; what is in ``path`` may be changed."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o755)
        self.path = folder / "escrow"
        self.does(f"printf '%s' '{json.dumps(DATA)}'")

    def does(self, script: str, *, takes: str = _TAKES, interpreter: str = "/bin/sh") -> None:
        """From now on it takes the key, and then does this."""
        self.path.write_text(f"#!{interpreter}\nset -e\n{takes}{script}\n", encoding="utf-8")
        self.path.chmod(0o755)

    @property
    def key(self) -> bytes:
        """What it has got."""
        return self._beside("key").read_bytes()

    @property
    def was_run(self) -> bool:
        """Whether it has got anything."""
        return self._beside("key").exists()

    @property
    def facts(self) -> dict[str, str]:
        """What its environment has told of the volume."""
        lines = self._beside("env").read_text(encoding="utf-8").splitlines()
        pairs = (line.split("=", 1) for line in lines if line.startswith("LUKSROTD_"))
        return {name.removeprefix("LUKSROTD_"): value for name, value in pairs}

    def _beside(self, suffix: str) -> Path:
        return self.path.with_suffix(f".{suffix}")
