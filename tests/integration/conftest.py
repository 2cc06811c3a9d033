# SPDX-License-Identifier: GPL-2.0-or-later
"""A volume, a client, and the daemon."""

import pytest
import pytest_asyncio

from tests.support import daemon_process
from tests.support.busclient import BusClient, Remote


@pytest_asyncio.fixture
async def client(bed):
    """Root's client, which collects the daemon's signals."""
    async with BusClient() as client:
        await client.subscribe()
        yield client


@pytest.fixture
def volume(bed):
    """A volume with one ordinary keyslot."""
    with daemon_process.disk(bed) as volume:
        yield volume


@pytest_asyncio.fixture
async def daemon(bed, client, volume):
    """The daemon, which has seen the volume."""
    async with daemon_process.running(bed, client) as daemon:
        await daemon_process.appeared(client, volume.path)
        yield daemon


@pytest_asyncio.fixture
async def enrolled(daemon, client, volume):
    """The volume with a managed key, whose secret is ``BACKUP``."""
    job = await daemon_process.start(client, volume.path, "Enroll", new=daemon_process.BACKUP)
    assert (await daemon_process.ended(client, job))["State"] == "finished"
    return volume


@pytest_asyncio.fixture
async def nobody(bed):
    """An unprivileged client."""
    remote = Remote(bed, bed.user("nobody").pw_uid)
    yield remote
    remote.close()


@pytest.fixture
def rules(bed):
    """Sets polkit rules: what an action of ours gives."""
    yield lambda result: bed.set_rules(
        "polkit.addRule(function (action, subject) {"
        f" if (action.id.indexOf('org.luksrotd1.') == 0) {{ return polkit.Result.{result}; }} }});"
    )
    bed.set_rules("")
