# SPDX-License-Identifier: GPL-2.0-or-later
"""The connection to the system bus: calls with descriptors, signals of the daemon, errors as exceptions."""

import asyncio
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType, MessageFlag, MessageType
from dbus_next.message import Message

from luksrotd import errors, names
from luksrotd.errors import Internal, InvalidRequest, LuksrotdError, Outcome, Unreachable

_BUS: Final = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
_PROPERTIES: Final = "org.freedesktop.DBus.Properties"
_STANDARD_ERROR: Final = "org.freedesktop.DBus.Error."
#: Errors of the bus, not of the daemon, that mean that nobody has answered.
_NOBODY: Final = ("ServiceUnknown", "NameHasNoOwner", "NoReply", "Disconnected", "TimedOut", "Timeout", "Spawn")
_TEXT: Final = re.compile(r"(?P<message>.*) \(device: (?P<outcome>[a-z-]+)\)", re.DOTALL)


class Connection:
    """One connection, made with the first call.  ``signals`` has those of jobs, and of the daemon going, in order.

    None in ``signals`` is the user's: a wish to stop.
    """

    def __init__(self) -> None:
        self.signals: asyncio.Queue[Message | None] = asyncio.Queue()
        #: Unique name of the daemon that has answered last.
        self.owner = ""
        self._bus: MessageBus | None = None

    async def listen(self) -> None:
        """Have the signals come."""
        jobs = f"type='signal',sender='{names.BUS_NAME}',path_namespace='{names.JOB_PATH}'"
        gone = f"type='signal',sender='{_BUS[0]}',member='NameOwnerChanged',arg0='{names.BUS_NAME}'"
        for rule in (jobs, gone):
            message = Message(*_BUS, member="AddMatch", signature="s", body=[rule])
            _checked(await self._send(message, Outcome.UNCHANGED), Outcome.UNCHANGED)

    async def call(
        self,
        path: str,
        member: tuple[str, str],
        signature: str = "a{sv}",
        body: Sequence[Any] = ({},),
        *,
        fds: Sequence[int] = (),
        lost: Outcome = Outcome.UNCHANGED,
    ) -> Message:
        """The reply of the daemon; ``member`` is an interface and a method of it, ``lost`` the outcome if none comes.

        Raises ``Unreachable``, ``InvalidRequest`` for what no message can hold, and what the daemon raised.
        """
        flags = MessageFlag.NONE
        if sys.stdin is not None and sys.stdin.isatty():
            flags |= MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION
        if path.startswith(names.JOB_PATH):
            # A job goes with its daemon: another one, which systemd may just have been told to stop, does not know it.
            flags |= MessageFlag.NO_AUTOSTART
        message = Message(
            destination=names.BUS_NAME,
            path=path,
            interface=member[0],
            member=member[1],
            signature=signature,
            body=list(body),
            unix_fds=list(fds),
            flags=flags,
        )
        reply = _checked(await self._send(message, lost), lost)
        self.owner = str(reply.sender)
        return reply

    async def properties(self, path: str, interface: str, lost: Outcome = Outcome.UNCHANGED) -> dict[str, Any]:
        """All properties of an interface; ``lost`` as of ``call``."""
        reply = await self.call(path, (_PROPERTIES, "GetAll"), "s", [interface], lost=lost)
        with understood():
            return {name: variant.value for name, variant in reply.body[0].items()}

    def close(self) -> None:
        """Leave the bus."""
        if self._bus is not None:
            self._bus.disconnect()  # type: ignore[no-untyped-call] # of dbus-next

    async def _send(self, message: Message, lost: Outcome) -> Message | None:
        try:
            bus = await self._connected()
            return await bus.call(message)
        except ValueError as error:  # a number out of range, a file name that is no text: nothing has been sent
            raise InvalidRequest(f"cannot ask luksrotd: {error}") from error
        except Unreachable:
            raise
        except Exception as error:
            raise _unreachable(_reason(error), lost) from error

    async def _connected(self) -> MessageBus:
        """The bus; raises ``Unreachable``."""
        if self._bus is None:
            try:
                self._bus = await MessageBus(bus_type=BusType.SYSTEM, negotiate_unix_fd=True).connect()
            except Exception as error:
                raise _unreachable(_reason(error), Outcome.UNCHANGED) from error
            self._bus.add_message_handler(self._on_message)
        return self._bus

    def _on_message(self, message: Message) -> None:
        # A signal that is sent to this connection alone passes every match rule: look at who sent it.
        ours = message.message_type is MessageType.SIGNAL and message.sender in (self.owner, _BUS[0])
        if ours and message.member in ("Completed", "PropertiesChanged", "NameOwnerChanged"):
            self.signals.put_nowait(message)


@contextmanager
def understood(known: Outcome = Outcome.UNCHANGED) -> Iterator[None]:
    """A block that takes apart what the daemon says, which may be of another version; raises ``Internal``.

    ``known``: what is true of the device then.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        odd = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise Internal(f"cannot understand luksrotd: {odd}; is it of another version?", outcome=known) from error


def error_of(name: str, text: str, *, lost: Outcome = Outcome.UNCHANGED) -> LuksrotdError:
    """The error that an error message stands for; ``lost`` is the outcome if it comes from the bus itself.

    The daemon's text ends in what the device holds now: ``cannot … (device: unchanged)``.
    """
    code = name.removeprefix(names.ERROR_PREFIX).removeprefix(_STANDARD_ERROR)
    if name.startswith(_STANDARD_ERROR) and code.startswith(_NOBODY):
        return _unreachable(text, lost)
    kind = errors.NotAuthorized if code == "AccessDenied" else errors.leaves().get(code, errors.Internal)
    told = _TEXT.fullmatch(text)
    if told is None or told["outcome"] not in list(Outcome):
        return kind(text)
    return kind(told["message"], outcome=Outcome(told["outcome"]))


def _checked(reply: Message | None, lost: Outcome) -> Message:
    if reply is None:
        raise _unreachable("it has closed the connection", lost)
    if reply.message_type is MessageType.ERROR:
        text = str(reply.body[0]) if reply.body else str(reply.error_name)
        raise error_of(str(reply.error_name), text, lost=lost)
    return reply


def _unreachable(reason: str, outcome: Outcome) -> Unreachable:
    return Unreachable(f"cannot reach luksrotd on the system bus: {reason}; use --direct as root", outcome=outcome)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
