# SPDX-License-Identifier: GPL-2.0-or-later
"""The bus connection: dbus-next's ``MessageBus`` made fit to face every user of the machine.

As it is, dbus-next 0.2.3 can be killed, starved or bled of descriptors by any client, and shows callers tracebacks.
``transport`` mends the socket, ``objects`` the standard interfaces, ``exposed`` the methods, and this class the rest:

* every descriptor that came with a message is closed, unless its handler took it; a returned one is closed when sent;
* every call that wants a reply gets one, also when its handler is cancelled, or has not started yet;
* at most ``CALLS_PER_CALLER`` calls of one connection are under way at a time (of one user: ``quota``);
* InterfacesAdded and InterfacesRemoved come from the ObjectManager's path;
* after the connection ended, calls and sends fail rather than hang, and the socket is closed.

The connection is never made anew: when it ends there is another ``Bus`` (``bus/link.py``).
"""

import asyncio
import logging
import os
from collections import Counter
from typing import Any, Final, Self

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType, ErrorType, MessageFlag, MessageType
from dbus_next.errors import DBusError, InvalidMessageError
from dbus_next.message import Message

from luksrotd.bus.caller import DAEMON, DAEMON_PATH, CallerVanished, current_message
from luksrotd.bus.exposed import Exposed, error_reply
from luksrotd.bus.interface import Interface
from luksrotd.bus.objects import OBJECT_MANAGER, Objects
from luksrotd.bus.transport import BATCH, Incoming, Outgoing
from luksrotd.bus.values import ReceivedFd, body_of
from luksrotd.errors import Cancelled, Internal

log = logging.getLogger(__name__)

CALL_SECONDS: Final = 25.0
"""How long to wait for a reply, unless told otherwise (libdbus' default)."""
CLOSE_SECONDS: Final = 5.0
"""How long ``Bus.close`` waits for the last messages to be written."""
TURN_SECONDS: Final = 0.01
"""How long calls may be taken in before other events get their turn: an answer from the tree of objects takes time."""
CALLS_PER_CALLER: Final = 128
"""Calls of one caller that may be under way; more are refused (dbus-daemon does so for calls that want a reply)."""


class Bus(MessageBus):
    """A connection to a message bus; to be made inside the event loop, then ``await connect()``.

    ``object_manager`` is the path of the ObjectManager ('' for none).
    """

    _writer: Outgoing  # type: ignore[assignment] # takes the place of dbus-next's
    _unmarshaller: Incoming

    def __init__(self, *, bus_type: BusType = BusType.SYSTEM, address: str = "", object_manager: str = "") -> None:
        super().__init__(bus_address=address, bus_type=bus_type, negotiate_unix_fd=True)
        self._writer = Outgoing(
            self._sock, self._loop, is_ready=lambda: self.unique_name is not None, on_error=self._finalize
        )
        self._objects = Objects(object_manager)
        self._wanted_fds: dict[int, list[ReceivedFd]] = {}
        self._tasks: set[asyncio.Task[Message]] = set()
        self._under_way: Counter[str] = Counter()

    # -- for the rest of luksrotd ---------------------------------------------------------------------------------

    async def connect(self) -> Self:
        """Authenticate and say Hello; raises ``OSError`` (``TimeoutError``), ``EOFError`` or ``AuthError``."""
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await super().connect()
        except BaseException:
            self._finalize(ConnectionError("cannot connect to the bus"))
            raise
        return self

    async def close(self) -> None:
        """Cancel what is being answered (each call gets its error), write out, disconnect."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.copy())
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._writer.drained()
        except TimeoutError:
            log.warning("the bus does not take the last messages")
        self.disconnect()
        self._finalize(None)

    def disconnect(self) -> None:
        """Close at once; idempotent."""
        if not self._disconnected:
            super().disconnect()  # type: ignore[no-untyped-call] # of dbus-next

    def export(self, path: str, interface: Interface) -> None:  # type: ignore[override] # ours only
        """Export an interface; raises ``ValueError`` when it is at that path already, ``TypeError`` for a bad path."""
        if not isinstance(interface, Interface):
            raise TypeError("only an Interface can be exported: its methods have their polkit actions")
        self._objects.add(path, interface)
        interface.exported(self, path)
        if self._objects.is_managed(path):
            self._announce("InterfacesAdded", "oa{sa{sv}}", [path, {interface.name: interface.values()}])

    def unexport(  # type: ignore[override] # ours only
        self, path: str, interface: Interface | str | None = None
    ) -> None:
        """Stop exporting an interface, or the whole object; nothing if there is none."""
        name = interface.name if isinstance(interface, Interface) else interface
        removed = self._objects.remove(path, name)
        for gone in removed:
            gone.exported(None, path)
        if removed and self._objects.is_managed(path):
            self._announce("InterfacesRemoved", "oas", [path, [gone.name for gone in removed]])

    def unexport_all(self) -> None:
        """Let go of every object, so that they let go of what they show."""
        for path in self._objects.paths():
            self.unexport(path)

    async def call(
        self, msg: Message, *, seconds: float | None = CALL_SECONDS, fds: list[ReceivedFd] | None = None
    ) -> Message | None:
        """Call and wait for the reply, a return or an error.

        Descriptors in it are appended to ``fds``, to be closed by the caller whatever is raised; without, they are
        closed.  Raises ``ConnectionError`` and ``TimeoutError``.
        """
        if not self.connected:
            raise ConnectionError("cannot call: not connected to the bus")
        msg.serial = msg.serial or self.next_serial()
        if fds is not None:
            self._wanted_fds[msg.serial] = fds
        try:
            async with asyncio.timeout(seconds):
                return await super().call(msg)
        finally:
            self._method_return_handlers.pop(msg.serial, None)
            self._wanted_fds.pop(msg.serial, None)

    async def ask(
        self, member: str, signature: str = "", body: list[Any] | None = None, *, fds: list[ReceivedFd] | None = None
    ) -> list[Any]:
        """Call a method of the bus daemon itself; the body of its reply.  As ``call``; raises ``DBusError`` too."""
        message = Message(
            destination=DAEMON, path=DAEMON_PATH, interface=DAEMON, member=member, signature=signature, body=body or []
        )
        return body_of(await self.call(message, fds=fds))

    def send(self, msg: Message) -> "asyncio.Future[None]":  # type: ignore[override] # as the class between has it
        """Queue a message; done when it was written.  Raises what its marshalling raises."""
        future: asyncio.Future[None] = self._loop.create_future()
        if self._disconnected:
            future.set_exception(ConnectionError("cannot send: not connected to the bus"))
            future.exception()  # nobody has to look
            return future
        msg.serial = msg.serial or self.next_serial()
        self._writer.schedule_write(msg, future)
        return future

    # -- incoming -------------------------------------------------------------------------------------------------

    def _message_reader(self) -> None:
        end = self._loop.time() + TURN_SECONDS
        try:
            for number in range(BATCH):
                if number and self._loop.time() >= end:
                    return
                try:
                    message = self._unmarshaller.receive()
                except InvalidMessageError as error:
                    log.warning("%s", error)
                    self._unmarshaller = self._create_unmarshaller()
                    continue
                if message is None:
                    return
                is_oversized = self._unmarshaller.oversized
                self._unmarshaller = self._create_unmarshaller()
                self._on_message(message, is_oversized=is_oversized)
        except (OSError, EOFError) as error:
            self._finalize(error)

    def _on_message(self, msg: Message, *, is_oversized: bool = False) -> None:
        fds = [ReceivedFd(fd) for fd in msg.unix_fds]
        try:
            msg.unix_fds = []
            if msg.message_type is MessageType.METHOD_CALL:
                self._answer(msg, fds, is_oversized=is_oversized)
            elif not is_oversized:
                if msg.reply_serial in self._wanted_fds:
                    self._wanted_fds[msg.reply_serial] += fds
                    fds = []
                self._process_message(msg)  # type: ignore[no-untyped-call] # of dbus-next
        except Exception:
            log.exception("cannot process a message")
        finally:
            if msg.message_type is not MessageType.METHOD_CALL:
                _close(fds)

    def _answer(self, message: Message, fds: list[ReceivedFd], *, is_oversized: bool) -> None:
        """Answer a call now, or start a task that does; close the descriptors in the end."""
        started = False
        try:
            if is_oversized:
                raise _limit("the message is too long")
            found = self._objects.find(message)
            if isinstance(found, Message):
                self._reply(message, found)
                return
            if self._under_way[message.sender] >= CALLS_PER_CALLER:
                raise _limit("too many calls at once")
            self._start(*found, message, fds)
            started = True
        except DBusError as error:
            self._reply(message, Message.new_error(message, error.type, error.text))
        except Exception:
            log.exception("%s failed", message.member)
            self._reply(message, error_reply(message, Internal("cannot answer: internal error")))
        finally:
            if not started:
                _close(fds)

    def _start(self, interface: Interface, method: Exposed, message: Message, fds: list[ReceivedFd]) -> None:
        async def answer() -> Message:
            current_message.set(message)
            return await method.answer(interface, message, fds)

        def done(task: asyncio.Task[Message]) -> None:
            self._tasks.discard(task)
            self._under_way[message.sender] -= 1
            self._under_way += Counter()  # forgets the callers without calls
            _close(fds)
            if task.cancelled():  # before it had begun
                self._reply(message, error_reply(message, Cancelled(f"cannot start {method.name}: it was cancelled")))
            elif isinstance(task.exception(), CallerVanished):
                log.debug("the caller of %s vanished", method.name)
            else:
                self._reply(message, task.result())

        task = self._loop.create_task(answer())
        self._tasks.add(task)
        self._under_way[message.sender] += 1
        task.add_done_callback(done)

    def _reply(self, message: Message, reply: Message) -> None:
        """Send the reply, if one is wanted, and close its descriptors once it is written."""
        fds = list(reply.unix_fds)
        if message.flags & MessageFlag.NO_REPLY_EXPECTED:
            _close_fds(fds)
            return
        try:
            sent = self.send(reply)
        except Exception:  # the handler's values do not fit its signature
            log.exception("cannot send the reply to %s", message.member)
            _close_fds(fds)
            self.send(error_reply(message, Internal(f"cannot answer {message.member}: internal error")))
            return
        sent.add_done_callback(lambda _: _close_fds(fds))

    # -- the connection -------------------------------------------------------------------------------------------

    def _announce(self, member: str, signature: str, body: list[Any]) -> None:
        if self.connected:
            self.send(Message.new_signal(self._objects.root, OBJECT_MANAGER, member, signature, body))

    def _create_unmarshaller(self) -> Incoming:
        return Incoming(self._sock)

    def _setup_socket(self) -> None:
        try:
            super()._setup_socket()  # type: ignore[no-untyped-call] # of dbus-next
        except BaseException:
            self._close_socket()
            raise

    async def _auth_readline(self) -> str:
        """One line of the authentication protocol; dbus-next would spin for ever at its end."""
        line = b""
        while not line.endswith(b"\r\n"):
            data = await self._loop.sock_recv(self._sock, 1)  # no more than the line: what follows is messages
            if not data:
                raise EOFError("the bus closed the connection")
            line += data
        return line[:-2].decode()

    def _finalize(self, err: BaseException | None = None) -> None:
        """The connection is over; idempotent."""
        if self._disconnected:
            return
        failure = err if isinstance(err, ConnectionError) else ConnectionError(str(err or "disconnected"))
        super()._finalize(failure)  # type: ignore[no-untyped-call] # of dbus-next
        self._disconnect_future.exception()  # nobody has to look
        self._unmarshaller.close_fds()
        self._writer.abandon(failure)
        self._close_socket()

    def _close_socket(self) -> None:
        for item in (getattr(self, "_stream", None), getattr(self, "_sock", None)):
            if item is not None:
                item.close()


def _limit(text: str) -> DBusError:
    return DBusError(ErrorType.LIMITS_EXCEEDED, text)  # type: ignore[no-untyped-call] # of dbus-next


def _close(fds: list[ReceivedFd]) -> None:
    for fd in fds:
        fd.close()


def _close_fds(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
