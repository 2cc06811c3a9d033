# SPDX-License-Identifier: GPL-2.0-or-later
"""The files of luksrotd.conf(5): the main one, then the drop-ins in the order of their names, as of systemd.conf(5)."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from luksrotd import names
from luksrotd.configfile import ConfigText
from luksrotd.errors import ConfigError

FILE_LIMIT: Final = 256 * 1024
"""Longest file, in bytes."""
FILES_LIMIT: Final = 256
"""Most drop-ins."""
_SUFFIX: Final = ".conf"
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def read(
    main: str = names.CONFIG_FILE, directories: Sequence[str] = names.CONFIG_DIRECTORIES, *, owner: int = 0
) -> tuple[ConfigText, ...]:
    """Every file that counts, in the order in which they count; ``directories``: the weightiest one last.

    Blocks; raises ``ConfigError`` for a file that cannot be read, is no regular one, too long, of anybody but
    ``owner``, or writable by others.
    """
    paths: dict[str, str] = {}
    for directory in directories:
        paths |= {name: f"{directory}/{name}" for name in _listed(directory)}
    if len(paths) > FILES_LIMIT:
        raise ConfigError(f"cannot read the configuration: more than {FILES_LIMIT} drop-ins")
    texts = (_read(path, owner) for path in (main, *(paths[name] for name in sorted(paths))))
    return tuple(text for text in texts if text is not None)


def _listed(directory: str) -> list[str]:
    try:
        entries = [path.name for path in Path(directory).iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"cannot read the configuration: {directory}: {error.strerror}") from error
    return [name for name in entries if name.endswith(_SUFFIX) and not name.startswith(".")]


def _read(path: str, owner: int) -> ConfigText | None:
    """The file; None if there is none, or a link to /dev/null in its place."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read the configuration: {path}: {error.strerror}") from error
    try:
        if _is_null(found := os.fstat(fd)):
            return None
        if reason := _unfit(found, owner):
            raise ConfigError(f"cannot read the configuration: {path}: {reason}")
        content = _content(fd)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration: {path}: {error.strerror}") from error
    finally:
        os.close(fd)
    if len(content) > FILE_LIMIT:
        raise ConfigError(f"cannot read the configuration: {path}: longer than {FILE_LIMIT} bytes")
    return ConfigText(path, content)


def _content(fd: int) -> bytes:
    """All of the file, or as much as shows that it is too long."""
    content = b""
    while len(content) <= FILE_LIMIT and (chunk := os.read(fd, FILE_LIMIT + 1)):
        content += chunk
    return content


def _is_null(found: os.stat_result) -> bool:
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 3)


def _unfit(found: os.stat_result, owner: int) -> str:
    """Why the file must not be used; '' if it may."""
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"
    if found.st_uid != owner:
        return f"belongs to uid {found.st_uid}, not {owner}"
    if found.st_mode & _OTHERS_WRITE:
        return f"others can write it (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""
