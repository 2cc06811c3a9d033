# SPDX-License-Identifier: GPL-2.0-or-later
"""The programs that the demo runs, printed as they are run; and the volume's header as they leave it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luksrotd import names
from tests.demo.screen import Broken, Screen, check
from tests.support.kernel import die_with_parent
from tests.support.testbed import PROJECT

SECONDS = 60
"""How long a command may take; none should take more than one or two."""
CHEAP = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
"""Key derivation that costs nothing."""
NO_KEY = 2
"""cryptsetup's exit status for a passphrase that opens nothing."""
_INSTALLED = shutil.which("luksrotctl", path=Path(sys.executable).parent)
LUKSROTCTL = (_INSTALLED,) if _INSTALLED else (sys.executable, "-m", "luksrotd.ctl")


class Commands:
    """Runs them in ``directory``, where the key files are."""

    def __init__(self, screen: Screen, directory: Path) -> None:
        self._screen = screen
        self.directory = directory
        self._environment = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "PYTHONPATH": str(PROJECT),
            "LC_ALL": "C.UTF-8",
            "XDG_RUNTIME_DIR": str(directory),  # for luksrotctl's locks where the user is not root
            "STATE_DIRECTORY": str(directory / "state"),  # for its inventories
        }

    def key(self, name: str, secret: bytes) -> None:
        """Make the key file ``name``, as root wants it for its own."""
        path = self.directory / name
        path.touch(mode=0o600)
        path.write_bytes(secret)

    def run(
        self,
        *command: str,
        status: int | None = 0,
        user: int | None = None,
        real: Sequence[str | Path] = (),
        quiet: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command and show it, unless ``quiet``; raise ``Broken`` if its exit status is not ``status``.

        ``real`` is what is run instead of the first word.
        """
        if not quiet:
            self._screen.command(command)
        argv = [*map(str, real or command[:1]), *command[1:]]
        done = subprocess.run(
            argv,
            cwd=self.directory,
            env=self._environment,
            user=user,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
            preexec_fn=die_with_parent,
        )
        if not quiet:
            self._screen.output(done.stdout + done.stderr)
        if status is not None and done.returncode != status:
            said = done.stderr.strip() or done.stdout.strip()
            raise Broken(f"{command[0]} ended with {done.returncode}, not with {status}: {said}")
        return done

    def luksrotctl(self, *arguments: str, status: int = 0) -> str:
        """Run luksrotctl; what it printed."""
        done = self.run("luksrotctl", *arguments, status=status, real=LUKSROTCTL)
        return done.stdout + done.stderr

    def busctl_call(self, path: str, interface: str, method: str, *arguments: str, **how: Any) -> str:
        """Call a method of the daemon with busctl; what it printed, without the type."""
        done = self.run(
            "busctl", "call", names.BUS_NAME, path, f"{names.BUS_NAME}.{interface}", method, *arguments, **how
        )
        return done.stdout.partition(" ")[2].strip().strip('"') + done.stderr

    def property(self, path: str, interface: str, name: str, *, quiet: bool = False) -> str:
        """A property of an object of the daemon."""
        words = ("get-property", names.BUS_NAME, path, f"{names.BUS_NAME}.{interface}", name)
        return self.run("busctl", *words, quiet=quiet).stdout.partition(" ")[2].strip().strip('"')

    def opens(self, volume: str | Path, key: str, *, quiet: bool = True) -> bool:
        """Whether stock cryptsetup opens the volume with the key file."""
        command = ("cryptsetup", "open", "--test-passphrase", "--key-file", key, str(volume))
        done = self.run(*command, status=None, quiet=quiet)
        check(done.returncode in (0, NO_KEY), f"cryptsetup cannot tell whether {key} opens {volume}: {done.stderr}")
        return done.returncode == 0

    def dump(self, volume: str | Path) -> dict[str, Any]:
        """The metadata, by stock cryptsetup."""
        done = self.run("cryptsetup", "luksDump", "--dump-json-metadata", str(volume), quiet=True)
        metadata: dict[str, Any] = json.loads(done.stdout)
        return metadata
