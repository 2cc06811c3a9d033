# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -P -m luksrotd.worker CONTROL-FD PARENT-PID``: one operation on one shadow, then the process is thrown away.

Started by ``luksrotd.host.worker`` with nothing open but the standard descriptors (null, null, a file for stderr), a
stream socket, the shadow and the secrets.  Everything is imported before the privileges go, as the code may lie where
only root can read.
"""

import os
import socket
import sys
import traceback

from luksrotd.errors import EngineError, Internal, LuksrotdError
from luksrotd.rotation import wire
from luksrotd.worker.confine import confine
from luksrotd.worker.session import Session


def main(control: int, parent: int) -> int:
    """Serve the socket ``control`` until its end or the first error; the exit status."""
    with socket.socket(fileno=control) as channel:
        session = Session(control)
        try:
            confine(parent)
            _serve(channel, session)
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


def _serve(channel: socket.socket, session: Session) -> None:
    with channel.makefile("rb") as lines:
        while line := lines.readline(wire.MAX_LINE + 1):
            if len(line) > wire.MAX_LINE:
                raise EngineError("cannot read a request: it is too long")
            channel.sendall(wire.success(session.handle(wire.decode(line))))


if __name__ == "__main__":
    # No interpreter shutdown: nothing is left to flush, and no destructor should run on half-freed C objects.
    os._exit(main(int(sys.argv[1]), int(sys.argv[2])))
