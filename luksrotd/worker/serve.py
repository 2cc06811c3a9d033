# SPDX-License-Identifier: GPL-2.0-or-later
"""Answer requests on a socket (``luksrotd.rotation.wire``) until its end or the first error."""

import socket
import traceback
from collections.abc import Callable
from typing import Final

from luksrotd.errors import EngineError, Internal, LuksrotdError
from luksrotd.rotation import wire
from luksrotd.worker.session import Session

CHUNK: Final = 65536
#: Descriptors that one message can carry (SCM_MAX_FD, unix(7)).
MAX_FDS: Final = 253
TOO_LONG: Final = "cannot read a request: it is too long"


def serve(control: int, parent: int, session_type: Callable[[int], Session], confine: Callable[[int], None]) -> int:
    """Give up with ``confine`` what is not needed, then serve the socket ``control``; the exit status.

    ``parent`` is the process that must not be outlived.
    """
    with socket.socket(fileno=control) as channel:
        session = session_type(control)
        try:
            confine(parent)
            _answer(channel, session)
        except LuksrotdError as error:
            channel.sendall(wire.failure(error))
            return 1
        except Exception as error:  # noqa: BLE001 - the boundary: what is left is a bug, its trace goes to the journal
            traceback.print_exc()
            channel.sendall(wire.failure(Internal(f"cannot go on: {type(error).__name__} in the worker")))
            return 1
        finally:
            session.close()
    return 0


def _answer(channel: socket.socket, session: Session) -> None:
    request, fds = _first(channel)
    if not request:
        return  # nobody had work for it
    session.take(fds)
    channel.sendall(wire.success(session.handle(wire.decode(request))))
    with channel.makefile("rb") as lines:
        while line := lines.readline(wire.MAX_LINE + 1):
            if len(line) > wire.MAX_LINE:
                raise EngineError(TOO_LONG)
            channel.sendall(wire.success(session.handle(wire.decode(line))))


def _first(channel: socket.socket) -> tuple[bytes, list[int]]:
    """The first request, after which nothing comes before it is answered, and the descriptors that come with it."""
    line, fds = b"", []
    while not line.endswith(b"\n"):
        part, more, _, _ = socket.recv_fds(channel, CHUNK, MAX_FDS)
        fds += more
        if not part:
            return b"", fds
        line += part
        if len(line) > wire.MAX_LINE:
            raise EngineError(TOO_LONG)
    return line, fds
