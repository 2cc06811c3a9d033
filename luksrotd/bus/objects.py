# SPDX-License-Identifier: GPL-2.0-or-later
"""The tree of exported objects, and the standard interfaces, which it answers from its own (no I/O but the machine id).

D-Bus Specification, "Standard Interfaces".  Where dbus-next is wrong: an unknown object is ``UnknownObject``, a call or
a property without an interface is looked up in all of them, only the root is an ObjectManager, children are found by
whole path elements.
"""

from pathlib import Path
from typing import Final

from dbus_next import introspection
from dbus_next.constants import ErrorType
from dbus_next.errors import DBusError
from dbus_next.message import Message
from dbus_next.signature import Variant
from dbus_next.validators import assert_object_path_valid

from luksrotd.bus.exposed import Exposed
from luksrotd.bus.frames import Prepared, dictionary, entries, managed
from luksrotd.bus.interface import PROPERTIES, Interface
from luksrotd.errors import plain

PEER: Final = "org.freedesktop.DBus.Peer"
INTROSPECTABLE: Final = "org.freedesktop.DBus.Introspectable"
OBJECT_MANAGER: Final = "org.freedesktop.DBus.ObjectManager"
STANDARD: Final = {
    (PEER, "Ping"): "",
    (PEER, "GetMachineId"): "",
    (INTROSPECTABLE, "Introspect"): "",
    (PROPERTIES, "Get"): "ss",
    (PROPERTIES, "GetAll"): "s",
    (PROPERTIES, "Set"): "ssv",
    (OBJECT_MANAGER, "GetManagedObjects"): "",
}
MACHINE_ID_FILES: Final = (Path("/var/lib/dbus/machine-id"), Path("/etc/machine-id"))


def _dbus_error(kind: ErrorType, text: str) -> DBusError:
    """The text may quote what the caller has sent, of any length."""
    return DBusError(kind, plain(text))  # type: ignore[no-untyped-call] # of dbus-next


class Objects:
    """Interfaces by path.  ``root`` is the path of the ObjectManager ('' for none)."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._objects: dict[str, dict[str, Interface]] = {}

    def add(self, path: str, interface: Interface) -> None:
        """Export; raises ``ValueError`` when that interface is there already, ``TypeError`` for a bad path."""
        assert_object_path_valid(path)
        found = self._objects.setdefault(path, {})
        if interface.name in found:
            raise ValueError(f"{interface.name} is already exported at {path}")
        found[interface.name] = interface

    def remove(self, path: str, name: str | None) -> list[Interface]:
        """Stop exporting one interface of an object, or (None) the object; what was removed."""
        found = self._objects.get(path, {})
        removed = [found.pop(key) for key in list(found) if name in (None, key)]
        if not found:
            self._objects.pop(path, None)
        return removed

    def paths(self) -> list[str]:
        """Every path with something at it."""
        return list(self._objects)

    def is_managed(self, path: str) -> bool:
        """Whether the ObjectManager tells of this path."""
        return bool(self.root) and path.startswith(self.root.rstrip("/") + "/")

    def find(self, message: Message) -> tuple[Interface, Exposed] | Message:
        """Who shall answer a call, or the answer where a standard interface gives it; raises ``DBusError``."""
        interfaces = self._objects.get(message.path, {})
        matching = [
            (interface, interface.methods[message.member])
            for name, interface in interfaces.items()
            if message.interface in (None, name) and message.member in interface.methods
        ]
        if matching:
            interface, method = matching[0]
            self._check(message, method.in_signature)
            return interface, method
        for (name, member), signature in STANDARD.items():
            if message.interface in (None, name) and message.member == member and self._has(message.path, name):
                self._check(message, signature)
                return self._standard(name, message)
        if not self._exists(message.path):
            raise _dbus_error(ErrorType.UNKNOWN_OBJECT, f"no object at {message.path}")
        if message.interface and not self._has(message.path, message.interface):
            raise _dbus_error(ErrorType.UNKNOWN_INTERFACE, f"no interface {message.interface} at {message.path}")
        raise _dbus_error(ErrorType.UNKNOWN_METHOD, f"no method {message.member} at {message.path}")

    # -- the tree -------------------------------------------------------------------------------------------------

    def _exists(self, path: str) -> bool:
        return path in self._objects or bool(self._children(path))

    def _children(self, path: str) -> list[str]:
        prefix = path.rstrip("/") + "/"
        below = [other.removeprefix(prefix) for other in self._objects if other.startswith(prefix)]
        return sorted({path.split("/")[0] for path in below} - {""})

    def _has(self, path: str, interface: str) -> bool:
        match interface:
            case "org.freedesktop.DBus.Peer":
                return True  # on any path at all, says the specification
            case "org.freedesktop.DBus.Introspectable":
                return self._exists(path)
            case "org.freedesktop.DBus.ObjectManager":
                return path == self.root
            case "org.freedesktop.DBus.Properties":
                return path in self._objects
            case _:
                return interface in self._objects.get(path, {})

    @staticmethod
    def _check(message: Message, signature: str) -> None:
        if message.signature != signature:
            text = f"{message.member} takes ({signature}), not ({message.signature})"
            raise _dbus_error(ErrorType.INVALID_ARGS, text)

    # -- the standard interfaces ----------------------------------------------------------------------------------

    def _standard(self, interface: str, message: Message) -> Message:
        match interface, message.member:
            case _, "Introspect":
                return Message.new_method_return(message, "s", [self._introspect(message.path)])
            case _, "GetManagedObjects":
                return Prepared(message, "a{oa{sa{sv}}}", self._managed())
            case _, "Ping":
                return Message.new_method_return(message)
            case _, "GetMachineId":
                return Message.new_method_return(message, "s", [_machine_id()])
            case _, "GetAll":
                return Prepared(message, "a{sv}", self._all(message.path, *message.body))
            case _, "Get":
                return Message.new_method_return(message, "v", [self._get(message.path, *message.body)])
            case _:
                self._get(message.path, *message.body[:2])
                raise _dbus_error(ErrorType.PROPERTY_READ_ONLY, f"{message.body[1]} cannot be set")

    def _named(self, path: str, name: str) -> list[Interface]:
        interfaces = self._objects[path]
        if name and name not in interfaces and not self._has(path, name):
            raise _dbus_error(ErrorType.UNKNOWN_INTERFACE, f"no interface {name} at {path}")
        return [interface for key, interface in interfaces.items() if name in ("", key)]

    def _get(self, path: str, name: str, member: str) -> Variant:
        for interface in self._named(path, name):
            if member in interface.properties:
                return interface.properties[member].variant(interface)
        raise _dbus_error(ErrorType.UNKNOWN_PROPERTY, f"no property {member} at {path}")

    def _all(self, path: str, name: str) -> bytes:
        interfaces = self._named(path, name)
        if len(interfaces) == 1:
            return dictionary(interfaces[0].entries())
        result: dict[str, Variant] = {}
        for interface in interfaces:
            result |= interface.values()
        return dictionary(entries(result))

    def _managed(self) -> bytes:
        return managed(
            {
                path: [(name, interface.entries()) for name, interface in interfaces.items()]
                for path, interfaces in self._objects.items()
                if self.is_managed(path)
            }
        )

    def _introspect(self, path: str) -> str:
        node = introspection.Node(path, is_root=True)
        known = introspection.Node.default().interfaces
        node.interfaces = [interface for interface in known if self._has(path, interface.name)]
        node.interfaces += [interface.introspect() for interface in self._objects.get(path, {}).values()]
        node.nodes = [introspection.Node(child) for child in self._children(path)]
        text: str = node.tostring()
        return text


def _machine_id() -> str:
    for path in MACHINE_ID_FILES:
        if path.is_file():
            return path.read_text().strip()
    raise _dbus_error(ErrorType.FILE_NOT_FOUND, "this machine has no machine id")
