# SPDX-License-Identifier: GPL-2.0-or-later
"""The exported service without a bus, on simulated ports: calls go to the objects, as ``Bus`` hands them over.

``Steps`` counts every suspension of every task, so that something can happen at each of them in turn.
"""

import asyncio
import os
from contextlib import asynccontextmanager, suppress

from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from luksrotd import names
from luksrotd.bus.caller import Callers, CallerVanished, current_message
from luksrotd.bus.guard import Guard
from luksrotd.bus.objects import Objects
from luksrotd.bus.publisher import Publisher
from luksrotd.bus.secrets import Keyring
from luksrotd.bus.served import Served
from luksrotd.bus.values import ReceivedFd
from luksrotd.service.drafts import Drafts
from luksrotd.service.owned import Means
from tests.service.world import Key, World
from tests.support.simkeeper import SimKeeper

NAME, UID = ":1.77", 1000


class Vanished(Exception):
    """The client is not there any more."""


class Steps:
    """While it is the task factory's: counts suspensions, and calls ``happen`` at number ``at``."""

    def __init__(self, at, happen):
        self.taken = 0
        self.at = at
        self._happen = happen

    def factory(self, loop, coroutine, **options):
        task = asyncio.Task(self._counted(coroutine), loop=loop, **options)
        task.add_done_callback(lambda _: coroutine.close())  # it has never begun if the task was cancelled before
        return task

    async def _counted(self, coroutine):
        return await _Counted(coroutine, self._step)

    def _step(self):
        if self.taken == self.at:
            self._happen()
        self.taken += 1


class _Counted:
    def __init__(self, coroutine, step):
        self._coroutine = coroutine
        self._step = step

    def __await__(self):
        inner = self._coroutine.__await__() if not hasattr(self._coroutine, "send") else self._coroutine
        send = lambda: inner.send(None)  # noqa: E731 -- one of three, chosen here
        while True:
            try:
                waiting = send()
            except StopIteration as done:
                return done.value
            self._step()
            try:
                yield waiting
            except BaseException as error:  # noqa: BLE001 -- whatever it is, it is for the coroutine
                thrown = error
                send = lambda: inner.throw(thrown)  # noqa: B023, E731 -- called in this very turn
            else:
                send = lambda: inner.send(None)  # noqa: E731 -- one of three, chosen here


class YesMan:
    """``ports.Authority``; it takes its time."""

    async def check(self, caller, action, details):
        await asyncio.sleep(0)


class Connection:
    """What ``Callers`` and ``Publisher`` need of ``Bus``."""

    def __init__(self):
        self.objects = Objects(names.ROOT_PATH)
        self.here = {NAME}

    async def ask(self, member, signature="", body=None, *, fds=None):
        await asyncio.sleep(0)
        if member == "GetConnectionCredentials":
            if body[0] not in self.here:
                raise KeyError(body[0])  # as where it has gone meanwhile
            return [{"UnixUserID": Variant("u", UID), "ProcessID": Variant("u", os.getpid())}]
        return []

    def add_message_handler(self, handler):
        self.handler = handler

    def export(self, path, interface):
        self.objects.add(path, interface)
        interface.exported(self, path)

    def unexport(self, path, interface=None):
        for gone in self.objects.remove(path, interface):
            gone.exported(None, path)

    def send(self, msg):
        """Nobody listens to signals."""

    def leaves(self, name):
        self.here.discard(name)
        signal = Message.new_signal(
            "/org/freedesktop/DBus", "org.freedesktop.DBus", "NameOwnerChanged", "sss", [name, name, ""]
        )
        signal.sender = "org.freedesktop.DBus"
        self.handler(signal)


class Loopback(World):
    """The world, its exported objects, and one client of them."""

    def __init__(self, **options):
        super().__init__(**options)
        self.bus = Connection()
        self.callers = Callers(self.bus, lambda *_: ("test", ""))
        self.guard = Guard(self.callers, YesMan())
        means = Means(self.registry, self.runner, SimKeeper())
        self.drafts = Drafts(self.host, means, lambda caller: self.callers.gone(caller.name))
        keyring = Keyring(self.guard, Key, lambda name: os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        served = Served(self.operations, self.sets, self.drafts, self.registry, self.runner, None)
        self._publisher = Publisher(self.bus, self.guard, keyring, served)
        self.answering = set()
        self.left = asyncio.Event()

    @asynccontextmanager
    async def serving(self):
        async with self.running():
            await self.callers.watch()
            self._publisher.publish()
            yield self

    def leave(self):
        """The client is killed."""
        self.left.set()
        self.bus.leaves(NAME)

    async def call(self, path, interface, member, signature="", body=(), fds=()):
        """The body of the reply, descriptors in it as they are; raises ``Vanished``, and ``AssertionError``."""
        if self.left.is_set():
            raise Vanished
        message = Message(path=path, interface=interface, member=member, signature=signature, body=list(body), serial=1)
        message.sender = NAME
        received = [ReceivedFd(os.dup(fd)) for fd in fds]
        task = asyncio.ensure_future(self._answer(message, received))
        self.answering.add(task)
        task.add_done_callback(self.answering.discard)
        left = asyncio.ensure_future(self.left.wait())
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        left.cancel()
        if not task.done():
            raise Vanished
        reply = task.result()
        if reply is None or self.left.is_set():
            raise Vanished
        assert reply.message_type is MessageType.METHOD_RETURN, reply.body
        return reply.body

    async def _answer(self, message, received):
        """As ``Bus`` does it; the reply, but that of one who has left is thrown away."""
        current_message.set(message)
        reply = None
        try:
            interface, method = self.bus.objects.find(message)
            with suppress(CallerVanished):
                reply = await method.answer(interface, message, received)
        finally:
            for fd in received:
                fd.close()
        for fd in reply.unix_fds if reply else ():
            os.close(fd)
        return reply
