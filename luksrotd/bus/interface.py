# SPDX-License-Identifier: GPL-2.0-or-later
"""The base of every exported interface, its properties and its signals.

    class Device(Interface):
        def __init__(self, guard: Guard, volume: Volume) -> None:
            super().__init__(names.DEVICE_INTERFACE, guard)
            self._volume = volume

        async def details(self, method: str, arguments: Sequence[Any]) -> Mapping[str, str]:
            return {"device": self._volume.node, "uuid": self._volume.uuid}

        @exposed("sa{sv}", "o", action=names.ACTION_ROTATE, options={"unlock": {"fd": "h"}}, outputs=["job"])
        async def rotate(self, caller: Caller, key: str, options: dict[str, Any]) -> str:
            job = await self._volume.rotate(key, SecretFd(options["unlock"]["fd"].take()), caller.uid)
            self.changed("Generation")
            return job.path

        @readable("t")
        def generation(self) -> int:
            return self._volume.generation

        @emitted("bs", "success", "message")
        def completed(self, success: bool, message: str) -> None:
            '''The job ended.'''

    bus.export("/org/luksrotd1/device/x", Device(guard, volume))

Properties and signals are for everybody on the bus: what needs an authorization is a method.  Getters are called in the
event loop and must not block; they return the value as ``values.to_body`` wants it (no descriptors).
"""

from __future__ import annotations

import functools
from contextlib import AbstractAsyncContextManager, nullcontext
from enum import StrEnum
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Concatenate,
    Generic,
    ParamSpec,
    Protocol,
    Self,
    TypeVar,
    cast,
    overload,
)
from xml.etree import ElementTree

from dbus_next import introspection
from dbus_next.constants import ArgDirection, PropertyAccess
from dbus_next.message import Message
from dbus_next.signature import SignatureTree, SignatureType, Variant

from luksrotd import names
from luksrotd.bus.exposed import Exposed, camel_case
from luksrotd.bus.frames import entries
from luksrotd.bus.guard import Question
from luksrotd.bus.values import to_body
from luksrotd.errors import UnknownDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from luksrotd.bus.guard import Guard
    from luksrotd.ports import Caller

P = ParamSpec("P")
T = TypeVar("T")
Exporting = TypeVar("Exporting", bound="Interface")
PROPERTIES = "org.freedesktop.DBus.Properties"
EMITS_CHANGED = "org.freedesktop.DBus.Property.EmitsChangedSignal"
SINCE = "org.gtk.GDBus.Since"
UNIX_FD = "org.gtk.GDBus.C.UnixFD"


class Emits(StrEnum):
    """What PropertiesChanged says of a property (D-Bus Specification, "Introspection Data Format")."""

    VALUE = "true"
    INVALIDATES = "invalidates"
    CONST = "const"
    NOTHING = "false"


class Readable(Generic[T]):
    """A read-only property: its value when it is looked up on an instance."""

    def __init__(self, getter: Callable[[Any], T], signature: str, name: str, emits: Emits) -> None:
        self.getter = getter
        self.signature = signature
        self.tree = SignatureTree._get(signature)
        if len(self.tree.types) != 1:
            raise TypeError(f"{getter.__qualname__}: not one complete type: {signature}")
        self.name = name
        self.emits = emits

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> Self | T:
        return self if instance is None else self.getter(instance)

    def variant(self, interface: Interface) -> Variant:
        """The value now."""
        return Variant(self.signature, to_body(self.tree, self.getter(interface), [])[0])


def readable(
    signature: str, *, name: str = "", emits: Emits = Emits.VALUE
) -> Callable[[Callable[[Any], T]], Readable[T]]:
    """Export a getter as a read-only property; ``name`` is by default the getter's in CamelCase."""
    return lambda getter: Readable(getter, signature, name or camel_case(getter.__name__), emits)


def emitted(
    signature: str, *arguments: str, name: str = ""
) -> Callable[[Callable[Concatenate[Exporting, P], None]], Callable[Concatenate[Exporting, P], None]]:
    """Export a method whose call sends a signal with its (positional) arguments; its body is never run."""
    kinds = SignatureTree._get(signature).types

    def decorate(method: Callable[Concatenate[Exporting, P], None]) -> Callable[Concatenate[Exporting, P], None]:
        member = name or camel_case(method.__name__)
        if len(arguments) != len(kinds):
            raise TypeError(f"{method.__qualname__} names {arguments}, its signature is {signature}")

        @functools.wraps(method)
        def send(self: Exporting, *args: P.args, **kwargs: P.kwargs) -> None:
            if kwargs:
                raise TypeError(f"{member}: positional arguments only")
            self.send_signal(self.name, member, signature, to_body(SignatureTree._get(signature), args, []))

        described = _arguments(kinds, arguments, ArgDirection.OUT)
        send.__dict__["dbus_signal"] = introspection.Signal(member, described)
        return cast("Callable[Concatenate[Exporting, P], None]", send)

    return decorate


class Exporter(Protocol):
    """What an interface needs of the bus it is exported on."""

    def send(self, msg: Message) -> object:
        """Queue a message."""


class Interface:
    """One interface of one object; a subclass decorates its members with ``exposed``, ``readable`` and ``emitted``.

    ``since``: the version of luksrotd that had it first.
    """

    since: ClassVar[str] = "0.1"
    methods: Mapping[str, Exposed] = {}
    properties: Mapping[str, Readable[Any]] = {}
    signals: Mapping[str, introspection.Signal] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        members = [getattr(cls, attribute, None) for attribute in dir(cls)]
        cls.methods = {member.name: member for member in members if isinstance(member, Exposed)}
        cls.properties = {member.name: member for member in members if isinstance(member, Readable)}
        found = [getattr(member, "dbus_signal", None) for member in members]
        cls.signals = {signal.name: signal for signal in found if isinstance(signal, introspection.Signal)}

    def __init__(self, name: str, guard: Guard) -> None:
        self.name = name
        self.guard = guard
        self._exported: tuple[Exporter, str] | None = None

    async def details(self, method: str, arguments: Sequence[Any]) -> Mapping[str, str]:
        """What polkit's agent may show (``$(device)``, ``$(uuid)``, ``$(key)``) and rules look up; no secrets."""
        return {}

    def is_of_system(self) -> bool:
        """Whether the volume that this is about belongs to the machine; it does unless that is known better."""
        return True

    async def questions(self, action: str, method: str, arguments: Sequence[Any]) -> Sequence[Question]:
        """What polkit is asked before the handler of a method with that action runs; all of it must be allowed."""
        asked = names.system_action(action) if self.is_of_system() else action
        return [Question(asked, {"operation": method, **await self.details(method, arguments)})]

    def turn(self, method: str, caller: Caller) -> AbstractAsyncContextManager[None]:
        """What the handler of the method runs in: calls run beside each other unless something keeps them in order."""
        return nullcontext()

    # -- towards the bus ------------------------------------------------------------------------------------------

    def exported(self, bus: Exporter | None, path: str) -> None:
        """Told by the bus: exported at a path, or (None) no longer."""
        self._exported = None if bus is None else (bus, path)

    def check_exported(self) -> None:
        """Raise ``UnknownDevice`` once the object has been withdrawn: what it was about is gone."""
        if self._exported is None:
            raise UnknownDevice("cannot go on: the object is gone")

    def changed(self, *names: str) -> None:
        """Tell the bus that the properties of these D-Bus names have changed; nothing while not exported."""
        found = [self.properties[name] for name in names]
        values = {item.name: item.variant(self) for item in found if item.emits is Emits.VALUE}
        invalidated = [item.name for item in found if item.emits is Emits.INVALIDATES]
        if values or invalidated:
            self.send_signal(PROPERTIES, "PropertiesChanged", "sa{sv}as", [self.name, values, invalidated])

    def values(self) -> dict[str, Variant]:
        """All properties."""
        return {name: item.variant(self) for name, item in self.properties.items()}

    def entries(self) -> bytes:
        """The same, marshalled (``frames.entries``)."""
        return entries(self.values())

    def send_signal(self, interface: str, member: str, signature: str, body: list[Any]) -> None:
        """Broadcast a signal from the object; nothing while not exported."""
        if self._exported:
            bus, path = self._exported
            bus.send(Message.new_signal(path, interface, member, signature, body))

    def introspect(self) -> introspection.Interface:
        """The introspection data, with annotations, which dbus-next lacks."""
        return _AnnotatedInterface(
            self.name,
            self.since,
            methods=[_describe(method) for method in self.methods.values()],
            properties=[_AnnotatedProperty(item) for item in self.properties.values()],
            signals=list(self.signals.values()),
        )


def _describe(method: Exposed) -> introspection.Method:
    inputs = _arguments(method.in_tree.types, method.inputs, ArgDirection.IN)
    outputs = _arguments(method.out_tree.types, method.outputs, ArgDirection.OUT)
    return _AnnotatedMethod(method.name, method.passes_fds, inputs, outputs)


def _arguments(
    kinds: Sequence[SignatureType], names: Sequence[str], direction: ArgDirection
) -> list[introspection.Arg]:
    return [
        introspection.Arg(kind, direction, name)  # type: ignore[arg-type] # dbus-next says list, and means one
        for kind, name in zip(kinds, names, strict=True)
    ]


class _AnnotatedInterface(introspection.Interface):
    def __init__(self, name: str, since: str, **members: Any) -> None:
        super().__init__(name, **members)
        self._since = since

    def to_xml(self) -> ElementTree.Element:
        element: ElementTree.Element = super().to_xml()
        element.insert(0, ElementTree.Element("annotation", name=SINCE, value=self._since))
        return element


class _AnnotatedMethod(introspection.Method):
    """``passes_fds``: also in a dictionary, where its signature does not show it."""

    def __init__(self, name: str, passes_fds: bool, *arguments: list[introspection.Arg]) -> None:
        super().__init__(name, *arguments)
        self._passes_fds = passes_fds

    def to_xml(self) -> ElementTree.Element:
        element: ElementTree.Element = super().to_xml()
        if self._passes_fds:
            element.insert(0, ElementTree.Element("annotation", name=UNIX_FD, value="true"))
        return element


class _AnnotatedProperty(introspection.Property):
    def __init__(self, item: Readable[Any]) -> None:
        super().__init__(item.name, item.signature, PropertyAccess.READ)
        self._emits = item.emits

    def to_xml(self) -> ElementTree.Element:
        element: ElementTree.Element = super().to_xml()
        ElementTree.SubElement(element, "annotation", name=EMITS_CHANGED, value=self._emits.value)
        return element
