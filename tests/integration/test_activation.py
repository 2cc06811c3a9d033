# SPDX-License-Identifier: GPL-2.0-or-later
"""Started by the first call.  Only dbus-daemon can do that without systemd."""

import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from luksrotd import names
from tests.integration.test_jobs import until
from tests.support.busclient import BusClient
from tests.support.daemon_process import PREFIX
from tests.support.testbed import PROJECT

pytestmark = pytest.mark.asyncio


@pytest.fixture
def activatable(bed, tmp_path):
    """The bus starts the daemon when it is called, as systemd would; ended by its process id."""
    plan = json.dumps({"prefix": PREFIX})
    script = bed.dir / "activated"
    script.write_text(
        f"#!/bin/sh\ncd {PROJECT}\nexport PYTHONPATH={PROJECT} STATE_DIRECTORY={tmp_path}\n"
        f"echo $$ >{tmp_path}/pid\n"
        f"exec {sys.executable} -m tests.support.daemon_launcher '{plan}' 2>{tmp_path}/log\n"
    )
    script.chmod(0o755)
    shipped = (PROJECT / "dbus" / f"{names.BUS_NAME}.service").read_text()
    service = bed.activation / f"{names.BUS_NAME}.service"
    # No systemd here: dbus-daemon itself starts what systemd would.
    service.write_text(shipped.replace("Exec=/bin/false", f"Exec={script}").replace("SystemdService=", "#"))
    yield tmp_path / "log"
    service.unlink()
    if (tmp_path / "pid").exists():
        with suppress(ProcessLookupError):  # as it should be
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


async def test_the_first_call_starts_the_daemon_and_gets_its_answer(bed, volume, activatable):
    async with BusClient() as client, asyncio.timeout(60):
        await ask_bus(client, "ReloadConfig")
        assert await ask_bus(client, "NameHasOwner", "s", names.BUS_NAME) == [False]
        called = (names.ROOT_PATH, names.MANAGER_INTERFACE, "GetDevices", "a{sv}", [{}])
        # The volumes are there when it answers, though it has been started by this call.
        assert await client.call(*called) == [[volume.path]]
        (pid,) = await ask_bus(client, "GetConnectionUnixProcessID", "s", names.BUS_NAME)
        assert str(pid) == activatable.with_name("pid").read_text().strip()
        os.kill(pid, signal.SIGTERM)
        await until(lambda: not Path(f"/proc/{pid}").exists())
        assert "Traceback" not in activatable.read_text()


async def ask_bus(client, member, signature="", *body):
    destination, client.destination = client.destination, "org.freedesktop.DBus"
    try:
        return await client.call("/org/freedesktop/DBus", "org.freedesktop.DBus", member, signature, body)
    finally:
        client.destination = destination
