# SPDX-License-Identifier: GPL-2.0-or-later
"""``@exposed``: the only way to export a method.  It carries the signature, the polkit action and the error boundary.

A call is answered in this order, and the first thing that fails is the reply:

1. arguments and options: ``InvalidArgs``; how many calls of the user are under way: ``LimitsExceeded``;
2. authorization, by ``Interface.questions``: for the action, or the stricter one for volumes of the system, with
   ``Interface.details`` for the agent's text; withdrawn should the caller vanish, asked again should it be about
   something else by then, void should the object be gone;
3. the handler, as ``await handler(interface, caller, *arguments)``, when it is its ``Interface.turn``;
4. its result, as the body of the reply.

Errors of ``luksrotd.errors`` go to the caller by ``bus.errors``; anything else goes to the journal, and the caller gets
``org.luksrotd1.Error.Internal`` without a word of it.
"""

import asyncio
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, Final, Self, overload

from dbus_next.message import Message
from dbus_next.signature import SignatureTree

from luksrotd import names
from luksrotd.bus.caller import CallerVanished
from luksrotd.bus.errors import name_of, text_of
from luksrotd.bus.values import OPTIONS_SIGNATURE, OptionTable, ReceivedFd, check_options, from_body, to_body
from luksrotd.errors import Cancelled, Internal, LuksrotdError, Outcome
from luksrotd.ports import Caller
from luksrotd.service.actor import acting

if TYPE_CHECKING:
    from luksrotd.bus.guard import Question
    from luksrotd.bus.interface import Interface

log = logging.getLogger(__name__)

UNPRIVILEGED: Final = "unprivileged"
"""Instead of an action: anybody may call; ``reason`` must say why."""

Handler = Callable[..., Any]


def exposed(
    in_signature: str,
    out_signature: str,
    *,
    action: str,
    reason: str = "",
    options: OptionTable | None = None,
    dictionaries: Mapping[str, OptionTable] | None = None,
    outputs: Sequence[str] = (),
    name: str = "",
) -> Callable[[Handler], "Exposed"]:
    """Export an ``async def handler(self, caller, …)`` as a D-Bus method.

    ``action`` is one of ``names.ACTIONS``, or ``UNPRIVILEGED`` with a ``reason``.  ``options`` are the known keys of a
    trailing ``a{sv}`` (none by default), ``dictionaries`` those of other ``a{sv}`` arguments by parameter name.
    ``outputs`` names the results.  ``name`` is the member (by default the handler's, in CamelCase).
    Raises ``TypeError`` where any of it does not fit the handler.
    """

    def decorate(handler: Handler) -> Exposed:
        if action not in names.ACTIONS and not (action == UNPRIVILEGED and reason):
            raise TypeError(f"{handler.__qualname__}: not a polkit action, nor a reason to need none: {action!r}")
        return Exposed(
            handler,
            name or camel_case(handler.__name__),
            (in_signature, out_signature),
            action="" if action == UNPRIVILEGED else action,
            tables=dict(dictionaries or {}),
            options=options or {},
            outputs=outputs,
        )

    return decorate


def _has_fd(table: OptionTable) -> bool:
    return any("h" in kind if isinstance(kind, str) else _has_fd(kind) for kind in table.values())


def camel_case(name: str) -> str:
    """D-Bus member of a Python name: ``get_devices`` is ``GetDevices``."""
    return "".join(word.capitalize() for word in name.split("_"))


class Exposed:
    """An exported method: the handler itself when it is looked up on an instance."""

    def __init__(
        self,
        handler: Handler,
        name: str,
        signatures: tuple[str, str],
        *,
        action: str,
        tables: dict[str, OptionTable],
        options: OptionTable,
        outputs: Sequence[str],
    ) -> None:
        self.handler = handler
        self.name = name
        self.action = action
        self.in_signature, self.out_signature = signatures
        self.in_tree, self.out_tree = (SignatureTree._get(signature) for signature in signatures)
        if not inspect.iscoroutinefunction(handler):
            raise TypeError(f"{handler.__qualname__} must be a coroutine function")
        self.inputs = list(inspect.signature(handler).parameters)[2:]  # without self and caller
        self.outputs = list(outputs)
        self.tables = tables
        types = [kind.signature for kind in self.in_tree.types]
        if len(self.inputs) != len(types):
            raise TypeError(f"{handler.__qualname__} takes {self.inputs}, its signature is {self.in_signature}")
        if len(outputs) != len(self.out_tree.types):
            raise TypeError(f"{handler.__qualname__} names {self.outputs}, it returns {self.out_signature}")
        if types[-1:] == [OPTIONS_SIGNATURE]:
            self.tables.setdefault(self.inputs[-1], options)
        elif options:
            raise TypeError(f"{handler.__qualname__} has options, but no trailing {OPTIONS_SIGNATURE}")
        for parameter in self.tables:
            if parameter not in self.inputs or types[self.inputs.index(parameter)] != OPTIONS_SIGNATURE:
                raise TypeError(f"{handler.__qualname__} has no {OPTIONS_SIGNATURE} called {parameter}")

    @property
    def passes_fds(self) -> bool:
        """Whether descriptors may come or go with it, in a dictionary too."""
        return "h" in self.in_signature + self.out_signature or any(_has_fd(table) for table in self.tables.values())

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Callable[..., Any]: ...
    def __get__(self, instance: object | None, owner: type) -> Self | Callable[..., Any]:
        return self if instance is None else MethodType(self.handler, instance)

    async def answer(self, interface: "Interface", message: Message, fds: Sequence[ReceivedFd]) -> Message:
        """The reply to a call: a return or an error, whatever happens; raises only ``CallerVanished``."""
        has_started = False
        try:
            arguments = self._arguments(message, fds)
            caller = await interface.guard.callers.current()
            with interface.guard.calls.one_of(caller.uid):
                if self.action:
                    await self._authorize(interface, caller, arguments)
                async with interface.turn(self.name, caller):
                    has_started = True
                    with acting(caller):
                        result = await self.handler(interface, caller, *arguments)
            return self._reply(message, result)
        except CallerVanished:
            raise
        except LuksrotdError as error:
            return error_reply(message, error)
        except asyncio.CancelledError:  # the daemon stops: this is the whole of a task, so nobody else needs to know
            outcome = Outcome.UNKNOWN if has_started else Outcome.UNCHANGED
            return error_reply(message, Cancelled(f"cannot finish {self.name}: it was cancelled", outcome=outcome))
        except Exception:
            log.exception("%s.%s failed", interface.name, self.name)
            outcome = Outcome.UNKNOWN if has_started else Outcome.UNCHANGED
            return error_reply(message, Internal(f"cannot finish {self.name}: internal error", outcome=outcome))

    async def _authorize(self, interface: "Interface", caller: Caller, arguments: Sequence[Any]) -> None:
        """Ask for all that is needed; once more if it is about something else by the time of the answer.

        A person may take minutes, and a medium be changed meanwhile.
        """
        asked: Sequence[Question] | None = None
        while (questions := await interface.questions(self.action, self.name, arguments)) != asked:
            await interface.guard.authorize_all(caller, questions)
            asked = questions
        interface.check_exported()

    def _arguments(self, message: Message, fds: Sequence[ReceivedFd]) -> list[Any]:
        for parameter, value in zip(self.inputs, message.body, strict=True):
            if parameter in self.tables:
                check_options(self.tables[parameter], value)
        return from_body(self.in_tree, message.body, fds)

    def _reply(self, message: Message, result: Any) -> Message:
        fds: list[int] = []
        body = to_body(self.out_tree, result, fds)
        return Message.new_method_return(message, self.out_signature, body, fds)


def error_reply(message: Message, error: LuksrotdError) -> Message:
    """The error as a reply to the message."""
    return Message.new_error(message, name_of(error), text_of(error))
