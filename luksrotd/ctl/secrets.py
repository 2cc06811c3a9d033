# SPDX-License-Identifier: GPL-2.0-or-later
"""Secrets of the user as descriptors: a key file as it is, everything else (pipe, terminal) in a sealed memfd.

No secret is ever a ``str`` or ``bytes`` here; what has to pass through goes through buffers that are zeroed.
"""

import fcntl
import hmac
import os
import stat
import sys
import termios
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from typing import Final

from luksrotd.errors import InvalidRequest, SecretRejected
from luksrotd.secret import FORMATTED_LENGTH, RANDOM_BYTES, write_recovery_key

STDIN: Final = "-"
#: Bytes; as much as the worker takes (``ports.SecretFd``), and cryptsetup from a key file.
LIMIT: Final = 8 * 1024 * 1024
#: Bytes; a passphrase that is typed (cryptsetup's DEFAULT_PASSPHRASE_SIZE_MAX).
TYPED_LIMIT: Final = 512

_TERMINAL: Final = "/dev/tty"
_RANDOM: Final = "/dev/urandom"
_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_CHUNK: Final = 65536
_LOCAL_MODES: Final = 3


@contextmanager
def opened(key_file: str | None, prompt: str, *, confirm: bool = False) -> Iterator[int]:
    """A descriptor for the secret: a path, ``-`` for standard input to its end, None to ask on the terminal.

    As with cryptsetup(8), nothing is cut off a key file, and ``-`` asks if standard input is a terminal.  ``confirm``:
    ask twice.  Raises ``SecretRejected``, or ``InvalidRequest`` where there is no terminal to ask on.
    """
    with ExitStack() as stack:
        if key_file is None or (key_file == STDIN and sys.stdin is not None and sys.stdin.isatty()):
            yield stack.enter_context(_asked(prompt, confirm=confirm))
        elif key_file == STDIN:
            yield stack.enter_context(_copied(0, "standard input"))
        else:
            fd = _open(key_file)
            stack.callback(os.close, fd)
            mode = os.fstat(fd).st_mode
            if stat.S_ISDIR(mode):
                raise SecretRejected(f"cannot use key file {key_file}: it is a directory")
            # A pipe may take longer than a worker waits: somebody may have to unlock a password store first.
            whole = stat.S_ISREG(mode) or stat.S_ISBLK(mode)
            yield fd if whole else stack.enter_context(_copied(fd, f"key file {key_file}"))


@contextmanager
def memfd() -> Iterator[int]:
    """A memfd for a secret that is still to come; zeroed at the end."""
    try:
        fd = os.memfd_create("luksrotctl-secret", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise SecretRejected(f"cannot make room for a secret: {error.strerror}") from error
    try:
        yield fd
    finally:
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE:
            with FileIO(fd, "r+", closefd=False) as file:
                file.seek(0)
                file.write(bytes(os.fstat(fd).st_size))
        os.close(fd)


@contextmanager
def generated() -> Iterator[int]:
    """A sealed memfd with a new key of 256 bits."""
    random, text = bytearray(RANDOM_BYTES), bytearray(FORMATTED_LENGTH)
    with memfd() as fd, FileIO(fd, "w", closefd=False) as target:
        try:
            _fill_randomly(random)
            with memoryview(random) as source, memoryview(text) as view:
                write_recovery_key(source, view)
            target.write(text)
        finally:
            wipe(random)
            wipe(text)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        yield fd


def read(fd: int) -> bytearray:
    """What a memfd holds, from its start; the caller zeroes it."""
    secret = bytearray(os.fstat(fd).st_size)
    os.preadv(fd, [secret], 0)
    return secret


def wipe(buffer: bytearray) -> None:
    """Zero it, in place."""
    buffer[:] = bytes(len(buffer))


def _fill_randomly(buffer: bytearray) -> None:
    """In place: what ``os.getrandom`` returns could not be zeroed."""
    os.getrandom(1)  # waits for the kernel's generator to be seeded, as the device does not
    try:
        with FileIO(_RANDOM, "r") as device, memoryview(buffer) as view:
            done = 0
            while done < len(buffer):
                done += device.readinto(view[done:]) or 0
    except OSError as error:
        raise SecretRejected(f"cannot make a key: {error.strerror}") from error


def _open(key_file: str) -> int:
    try:
        return os.open(key_file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise SecretRejected(f"cannot open key file {key_file}: {error.strerror}") from error
    except ValueError as error:
        raise SecretRejected("cannot open a key file: not a path") from error


@contextmanager
def _copied(source: int, name: str) -> Iterator[int]:
    """A sealed memfd with all that comes from ``source``."""
    chunk = bytearray(_CHUNK)
    with memfd() as fd, FileIO(fd, "w", closefd=False) as target:
        try:
            with FileIO(source, "r", closefd=False) as stream, memoryview(chunk) as view:
                total = 0
                while count := stream.readinto(chunk) or 0:
                    total += count
                    if total > LIMIT:
                        raise SecretRejected(f"cannot use {name}: it is longer than {LIMIT} bytes")
                    target.write(view[:count])
        except OSError as error:
            raise SecretRejected(f"cannot read {name}: {error.strerror}") from error
        finally:
            wipe(chunk)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        yield fd


@contextmanager
def _asked(prompt: str, *, confirm: bool) -> Iterator[int]:
    """A sealed memfd with what the user types."""
    typed, again = bytearray(2 * TYPED_LIMIT), bytearray(2 * TYPED_LIMIT)
    with memfd() as fd, FileIO(fd, "w", closefd=False) as target, memoryview(typed) as view:
        try:
            length = _ask(f"{prompt}: ", typed)
            if confirm:
                repeated = _ask(f"{prompt} (again): ", again)
                with memoryview(again) as other:
                    if not hmac.compare_digest(view[:length], other[:repeated]):
                        raise SecretRejected("cannot use the passphrase: the two entries differ")
            target.write(view[:length])
        finally:
            wipe(typed)
            wipe(again)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        yield fd


def _ask(prompt: str, buffer: bytearray) -> int:
    """Read one line from the terminal into ``buffer``, without echo; its length without the newline."""
    try:
        terminal = FileIO(_TERMINAL, "r+")
    except OSError as error:
        raise InvalidRequest("cannot ask for a passphrase: there is no terminal; see --key-file") from error
    with terminal:
        attributes = termios.tcgetattr(terminal)
        silent = [*attributes]
        silent[_LOCAL_MODES] &= ~termios.ECHO
        try:
            termios.tcsetattr(terminal, termios.TCSAFLUSH, silent)
            terminal.write(prompt.encode(errors="replace"))
            count = terminal.readinto(buffer)
        except OSError as error:
            raise SecretRejected(f"cannot read the passphrase: {error.strerror}") from error
        finally:
            termios.tcsetattr(terminal, termios.TCSAFLUSH, attributes)
            terminal.write(b"\n")
    end = buffer.find(b"\n", 0, count)
    length = count if end < 0 else end
    if length == 0:
        raise SecretRejected("cannot use the passphrase: it is empty")
    if length > TYPED_LIMIT:
        raise SecretRejected(f"cannot use the passphrase: it is longer than {TYPED_LIMIT} bytes")
    return length
