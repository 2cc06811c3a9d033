# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon takes of the machine's memory; ``make bench`` measures how much it is."""

from pathlib import Path

import pytest

from tests.support.daemon_process import ended, start

pytestmark = pytest.mark.asyncio
#: Of address space, for each heap that glibc makes for a thread (malloc/arena.c).
HEAP_KIB = 64 * 1024


async def test_its_threads_share_one_heap(daemon, enrolled, client):
    assert (await ended(client, await start(client, enrolled.path)))["State"] == "finished"
    lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()  # noqa: ASYNC240 -- no disk is read
    told = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    threads, kib = int(told["Threads"][0]), int(told["VmSize"][0])
    assert threads > 2
    assert kib < threads * HEAP_KIB
