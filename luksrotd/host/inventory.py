# SPDX-License-Identifier: GPL-2.0-or-later
"""Inventories as files: one for each volume in the state directory, replaced as a whole."""

import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from luksrotd import names
from luksrotd.errors import FormatError, StateError
from luksrotd.rotation import inventory
from luksrotd.rotation.inventory import Inventory

#: A header could hold anything, and this becomes the name of a file.
_UUID: Final = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")


def state_directory(environment: Mapping[str, str] = os.environ, *, uid: int | None = None) -> str:
    """Where inventories are: what systemd says (systemd.exec(5), ``StateDirectory=``), else /var/lib/luksrotd for root.

    For others ``$XDG_STATE_HOME/luksrotd``, or ~/.local/state/luksrotd; raises ``StateError`` if they have no home.
    """
    named = environment.get("STATE_DIRECTORY", "")
    if named.startswith("/"):
        return named
    if (os.geteuid() if uid is None else uid) == 0:
        return names.STATE_DIRECTORY
    home = environment.get("HOME", "")
    base = environment.get("XDG_STATE_HOME", "") or (f"{home}/.local/state" if home else "")
    if not base.startswith("/"):
        raise StateError("cannot find a directory for inventories: HOME is not set")
    return str(Path(base, Path(names.STATE_DIRECTORY).name))


class FileInventories:
    """``ports.Inventories``; ``directory`` in place of the one of this machine."""

    def __init__(self, directory: str | None = None) -> None:
        self._directory = directory

    def load(self, uuid: str) -> Inventory | None:
        """See ``ports.Inventories``."""
        path = self._path(uuid)
        try:
            return inventory.parse(_read(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _failed("read", path, error) from error
        except FormatError as error:
            raise StateError(f"{error.message}; see {path}") from error

    def save(self, uuid: str, kept: Inventory) -> None:
        """See ``ports.Inventories``."""
        path = self._path(uuid)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _replace(path, inventory.serialise(kept))
        except OSError as error:
            raise _failed("write", path, error) from error

    def _path(self, uuid: str) -> Path:
        name = uuid.lower()
        if not _UUID.fullmatch(name):
            raise StateError("cannot keep an inventory of the volume: its LUKS UUID is malformed")
        return Path(self._directory or state_directory(), f"{name}.json")


def _read(path: Path) -> bytes:
    """The content of a regular file, or so much of it that it cannot be ours."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FormatError("cannot read the inventory: it is not a file")
        return os.read(fd, inventory.SIZE_MAX + 1)
    finally:
        os.close(fd)


def _replace(path: Path, content: bytes) -> None:
    """Atomic, and durable; readable by its owner alone."""
    import tempfile  # noqa: PLC0415 - slow to import; most of those who rotate a key write none

    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        Path(temporary).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _failed(verb: str, path: Path, error: OSError) -> StateError:
    return StateError(f"cannot {verb} the inventory {path}: {error.strerror}")
