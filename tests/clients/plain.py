# SPDX-License-Identifier: GPL-2.0-or-later
"""A client in jeepney, which is nothing but messages: match rules, descriptors, flags."""

import json
import sys
from pathlib import Path
from typing import Any

from jeepney import DBusAddress, MatchRule, message_bus, new_method_call
from jeepney.io.blocking import Proxy, open_dbus_connection

NAME, ROOT = "org.luksrotd1", "/org/luksrotd1"
FAST = {"pbkdf": ("s", "pbkdf2"), "pbkdf-force-iterations": ("u", 1000)}
PROPERTIES = "org.freedesktop.DBus.Properties"


class Client:
    """One connection."""

    def __init__(self) -> None:
        self.bus = open_dbus_connection(bus="SYSTEM", enable_fds=True)
        self.seen: list[Any] = []

    def call(self, path: str, interface: str, method: str, signature: str, body: tuple[Any, ...]) -> Any:
        """The body of the reply."""
        address = DBusAddress(path, bus_name=NAME, interface=interface)
        reply = self.bus.send_and_get_reply(new_method_call(address, method, signature, body))
        if reply.header.message_type.name == "error":
            raise RuntimeError(next(value for key, value in reply.header.fields.items() if key.name == "error_name"))
        return reply.body

    def start(self, device: str, method: str, secrets: list[str]) -> dict[str, Any]:
        """Enroll or Rotate; the Result of the job."""
        # jeepney compares the sender with a message's own, which is a unique name: that is for the bus to do.
        Proxy(message_bus, self.bus).AddMatch(MatchRule(type="signal", sender=NAME, interface=f"{NAME}.Job"))
        with (
            self.bus.filter(MatchRule(type="signal", interface=f"{NAME}.Job", member="Completed")) as ended,
            Path(secrets[0]).open("rb") as old,
            Path(secrets[1]).open("rb") as new,
        ):
            body = ("", {"fd": ("h", old)}, {"fd": ("h", new)}, FAST)
            (job,) = self.call(device, f"{NAME}.Device", method, "sa{sv}a{sv}a{sv}", body)
            self.seen.append(list(self.bus.recv_until_filtered(ended, timeout=60).body))
        (result,) = self.call(job, PROPERTIES, "Get", "ss", (f"{NAME}.Job", "Result"))
        return {name: value for name, (_, value) in result[1].items()}


def main() -> None:
    """Enrol, rotate, tell."""
    device, old, backup, new = sys.argv[1:]
    client = Client()
    (devices,) = client.call(ROOT, f"{NAME}.Manager", "GetDevices", "a{sv}", ({},))
    results = [client.start(device, "Enroll", [old, backup]), client.start(device, "Rotate", [old, new])]
    try:
        client.call(device, f"{NAME}.Device", "Rotate", "sa{sv}a{sv}a{sv}", ("", {}, {}, {}))
    except RuntimeError as error:
        failure = str(error)
    print(json.dumps({"devices": devices, "results": results, "seen": client.seen, "failure": failure}))


if __name__ == "__main__":
    main()
