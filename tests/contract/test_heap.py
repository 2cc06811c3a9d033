# SPDX-License-Identifier: GPL-2.0-or-later
"""The C library's heaps, in processes of their own."""

import asyncio
import subprocess
import sys

import pytest

from luksrotd.host.heap import Quiet

#: Threads that are there at the same time make and free 32 MiB in all, and keep a small piece of every hundred.
THREADS = """
import threading
from pathlib import Path
from luksrotd.host import heap

def kib(name):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1])

together, kept = threading.Barrier(8), []

def work():
    together.wait()
    pieces = [bytes(4096) for _ in range(1024)]
    kept.extend(bytes(1024) for _ in range(10))
    for number in range(0, 1024, 100):
        kept.append(pieces[number])
    together.wait()

def run():
    before = kib("VmSize")
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return kib("VmSize") - before
"""
SHARED = "heap.share_heap()"
#: Of address space, more than eight threads take for their stacks, and less than for heaps of their own.
ADDRESSES_KIB = 256 * 1024


def told_by(*lines):
    done = subprocess.run([sys.executable, "-c", "\n".join([THREADS, *lines])], capture_output=True, check=True)
    return int(done.stdout)


def test_threads_share_one_heap():
    assert told_by("print(run())") > ADDRESSES_KIB > told_by(SHARED, "print(run())")


@pytest.mark.parametrize("lines", [[], [SHARED]])
def test_what_is_free_is_given_back(lines):
    more = "grown = kib('VmRSS'); heap.give_back(); print(grown - kib('VmRSS'))"
    assert told_by(*lines, "run()", more) > 8 * 1024


@pytest.mark.asyncio
async def test_what_jobs_have_left_is_given_back_once_when_it_is_quiet():
    loop, quiet = asyncio.get_running_loop(), asyncio.Event()
    times = []

    def then():
        times.append(loop.time())
        quiet.set()

    observer = Quiet(then, seconds=0.05)
    for _ in range(3):
        observer.job_added(None)
        observer.job_ended(None)
        last = loop.time()
        observer.job_forgotten(None)
    async with asyncio.timeout(30):
        await quiet.wait()
    assert times[0] >= last + 0.05
    quiet.clear()
    observer.job_ended(None)
    async with asyncio.timeout(30):
        await quiet.wait()
    assert len(times) == 2
