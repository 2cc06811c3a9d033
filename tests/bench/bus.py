# SPDX-License-Identifier: GPL-2.0-or-later
"""9: what the properties of volumes cost who asks for them, against a ping of the bus daemon itself."""

import time
from collections.abc import Mapping
from typing import Final

from luksrotd import names
from tests.bench import real, wire
from tests.bench.figures import Finding, Result, Series
from tests.bench.rounds import Trial, interleaved
from tests.bench.stage import stage
from tests.support.daemon_process import appeared

VOLUMES: Final = 200
AT_ONCE: Final = 32
RARE: Final = 20
"""GetManagedObjects of that many volumes takes so long that it is called in one round of so many."""
PING, GET_ALL, MANAGED = "ping of the bus daemon", "GetAll of a device", f"GetManagedObjects, {VOLUMES} devices"
OWN_PING: Final = "ping of luksrotd"
POLICY: Final = """<busconfig><policy user="root">
<allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Peer"/>
</policy></busconfig>"""
"""Debian's policy of the system bus lets nobody ping the bus daemon itself."""
METHOD: Final = f"""{VOLUMES} volumes on loop devices, the daemon idle. One connection calls, in turn and in an
order that chance makes: org.freedesktop.DBus.Peer.Ping of the bus daemon, the same of luksrotd, GetAll of
org.luksrotd1.Device, and GetManagedObjects. The client is a socket: calls are made beforehand, replies are read to
their end but not parsed, so that no library's time is in the figures, and none makes the ping look slow. A ping of
the bus daemon ends there; every other call goes through the bus daemon twice, and wakes a second process. Calls per
second: {AT_ONCE} calls are under way at a time."""


async def properties(rounds: int) -> Result:
    """9."""
    async with stage(daemon=False) as place:
        (place.bed.dir / "bus-policy" / "bench.conf").write_text(POLICY)
        disks = real.volumes(place, VOLUMES)
        async with real.daemon(place.bed):
            for disk in disks:
                await appeared(place.client, disk.path)
            with wire.Wire() as client:
                client.call(wire.call(wire.BUS, "/org/freedesktop/DBus", wire.BUS, "ReloadConfig"))
                return _result(*await _measured(client, disks[0].path, rounds))


async def _measured(client: wire.Wire, path: str, rounds: int) -> tuple[list[Series], list[Series]]:
    peer, manager = "org.freedesktop.DBus.Peer", "org.freedesktop.DBus.ObjectManager"
    calls = {
        PING: wire.call(wire.BUS, "/org/freedesktop/DBus", peer, "Ping"),
        OWN_PING: wire.call(names.BUS_NAME, names.ROOT_PATH, peer, "Ping"),
        GET_ALL: wire.call(
            names.BUS_NAME, path, "org.freedesktop.DBus.Properties", "GetAll", "s", [names.DEVICE_INTERFACE]
        ),
    }
    managed = wire.call(names.BUS_NAME, names.ROOT_PATH, manager, "GetManagedObjects")
    times = await interleaved({name: _once(client, call) for name, call in calls.items()}, rounds)
    times += await interleaved({MANAGED: _once(client, managed)}, max(rounds // RARE, 3))
    return times, await _rates(client, calls, max(rounds // RARE, 3))


def _once(client: wire.Wire, call: bytearray) -> Trial:
    async def trial() -> float:
        begun = time.perf_counter()
        client.call(call)
        return time.perf_counter() - begun

    return trial


async def _rates(client: wire.Wire, calls: Mapping[str, bytearray], rounds: int) -> list[Series]:
    def many(call: bytearray) -> Trial:
        async def trial() -> float:
            begun = time.perf_counter()
            client.calls(call, AT_ONCE)
            return AT_ONCE / (time.perf_counter() - begun)

        return trial

    found = await interleaved({name: many(call) for name, call in calls.items()}, rounds, unit="calls/s")
    return [Series(f"{one.name}, {AT_ONCE} at once", one.unit, one.values) for one in found]


def _result(times: list[Series], rates: list[Series]) -> Result:
    named = {one.name: one for one in times}
    ping = named[PING].percentile(50)
    spread = [
        Series(f"{one.name}, p{percent}", one.unit, (one.percentile(percent),)) for one in times for percent in (50, 99)
    ]
    findings = [Finding("p50 of GetAll / p50 of the ping", named[GET_ALL].percentile(50) / ping, 5)]
    ratios = [named[name].over(named[PING]) for name in (GET_ALL, OWN_PING)]
    return Result(9, "Properties over D-Bus", METHOD, [*times, *spread, *rates], ratios, findings)
