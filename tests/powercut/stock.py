# SPDX-License-Identifier: GPL-2.0-or-later
"""What the cryptsetup command makes of a state: for the oracle and the classifier of the crash tests."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from luksrotd.cryptsetup.memory import SafeMemory
from luksrotd.errors import EngineError
from tests.support.oracle import Libcryptsetup, Raw, Tool

#: What ``cryptsetup open`` says of a passphrase that is not the one of the keyslot, and of a keyslot that is not there.
_NO = (b"No key available", b"No usable keyslot", b"is not active", b"is invalid")


class Stock(Libcryptsetup):
    """The same by processes of the installed cryptsetup; nobody else has looked at the state before them."""

    def _tool(self, fd: int) -> AbstractContextManager[Tool]:
        return _loaded(f"/proc/{os.getpid()}/fd/{fd}")


class Command:
    """The cryptsetup command on one image."""

    def __init__(self, path: str) -> None:
        self._path = path
        status, output, complaint = run("luksDump", "--dump-json-metadata", path)
        if status:
            raise EngineError(f"cannot load it: {complaint.decode(errors='replace').strip()}")
        self._raw: Raw = json.loads(output)

    def metadata(self) -> Raw:
        """See ``oracle.Tool``."""
        return self._raw

    def opens(self, passphrase: SafeMemory, keyslot: int) -> bool:
        """See ``oracle.Tool``."""
        options = ("--test-passphrase", "--disable-external-tokens", "--key-file", "-", "--key-slot", str(keyslot))
        status, _, complaint = run("open", *options, self._path, stdin=bytes(passphrase.view()))
        if status and not any(no in complaint for no in _NO):
            raise EngineError(f"cannot try keyslot {keyslot}: {complaint.decode(errors='replace').strip()}")
        return status == 0


def run(*arguments: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    """Exit status, output, and complaints of cryptsetup."""
    done = subprocess.run(["cryptsetup", "--batch-mode", *arguments], input=stdin, capture_output=True, check=False)
    return done.returncode, done.stdout, done.stderr


@contextmanager
def _loaded(path: str) -> Iterator[Command]:
    yield Command(path)
