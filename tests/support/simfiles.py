# SPDX-License-Identifier: GPL-2.0-or-later
"""Backup files in memory."""

import errno
import os

from luksrotd.errors import DeviceError, InvalidRequest, UnknownDevice


class SimFiles:
    """``ports.HeaderFiles`` over a dictionary.  ``full``: there is no room for another file."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.full = False

    def create(self, path: str, content: bytes, headers: int) -> None:
        """Keep the file."""
        assert 0 < headers <= len(content)
        if path in self.content:
            raise InvalidRequest(f"cannot write {path}: there is something of that name, which is left alone")
        if self.full:
            raise DeviceError(f"cannot write {path}: {os.strerror(errno.ENOSPC)}")
        self.content[path] = content

    def read(self, path: str, limit: int) -> bytes:
        """As much of the file as is wanted."""
        if path not in self.content:
            raise UnknownDevice(f"cannot open {path}: {os.strerror(errno.ENOENT)}")
        return self.content[path][:limit]
