# SPDX-License-Identifier: GPL-2.0-or-later
"""A client as a desktop program is one: GLib's object manager, proxies with cached properties, signals, descriptors."""

import json
import os
import sys
from typing import Any

import gi

gi.require_version("Gio", "2.0")
from gi.repository import Gio, GLib  # noqa: E402 - its version must be asked for before

NAME, ROOT = "org.luksrotd1", "/org/luksrotd1"
FAST = {"pbkdf": GLib.Variant("s", "pbkdf2"), "pbkdf-force-iterations": GLib.Variant("u", 1000)}


class Client:
    """Follows everything below the root."""

    def __init__(self) -> None:
        self.loop = GLib.MainLoop()
        self.manager = Gio.DBusObjectManagerClient.new_for_bus_sync(
            Gio.BusType.SYSTEM, Gio.DBusObjectManagerClientFlags.NONE, NAME, ROOT, None, None, None
        )
        self.seen: list[Any] = []
        self.manager.connect("object-added", lambda _, one: self.seen.append(["added", one.get_object_path()]))
        self.manager.connect("interface-proxy-signal", self._signal)
        self.manager.connect("interface-proxy-properties-changed", self._changed)

    def start(self, device: str, method: str, secrets: list[str]) -> str:
        """Enroll or Rotate; the path of the job."""
        fds = Gio.UnixFDList.new_from_array([os.open(secret, os.O_RDONLY) for secret in secrets])
        described = [{"fd": GLib.Variant("h", index)} for index in range(2)]
        body = GLib.Variant("(sa{sv}a{sv}a{sv})", ("", *described, FAST))
        reply, _ = self.manager.get_connection().call_with_unix_fd_list_sync(
            NAME, device, f"{NAME}.Device", method, body, GLib.VariantType("(o)"), Gio.DBusCallFlags.NONE, -1, fds, None
        )
        self.loop.run()  # until Completed
        return str(reply.unpack()[0])

    def cached(self, path: str, interface: str, name: str) -> Any:
        """A property as the proxy has it, without a call."""
        return self.manager.get_object(path).get_interface(interface).get_cached_property(name).unpack()

    def _signal(self, manager: Any, one: Any, proxy: Any, sender: str, name: str, arguments: Any) -> None:
        self.seen.append([name, one.get_object_path(), *arguments.unpack()])
        if name == "Completed":
            self.loop.quit()

    def _changed(self, manager: Any, one: Any, proxy: Any, changed: Any, invalidated: Any) -> None:
        self.seen += [[name, one.get_object_path(), value] for name, value in changed.unpack().items()]


def main() -> None:
    """Enrol, rotate, tell."""
    device, old, backup, new = sys.argv[1:]
    client = Client()
    before = client.cached(device, f"{NAME}.Device", "Generation")
    jobs = [client.start(device, "Enroll", [old, backup]), client.start(device, "Rotate", [old, new])]
    results = [client.cached(job, f"{NAME}.Job", "Result") for job in jobs]
    try:
        client.manager.get_object(device).get_interface(f"{NAME}.Device").GetData("(sa{sv})", "none", {})
    except GLib.Error as error:
        failure = Gio.DBusError.get_remote_error(error)
    keys = client.cached(device, f"{NAME}.Device", "Keys")
    print(json.dumps({"before": before, "jobs": jobs, "results": results, "seen": client.seen, "keys": keys,
                      "failure": failure}))  # fmt: skip


if __name__ == "__main__":
    main()
