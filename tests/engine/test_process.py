# SPDX-License-Identifier: GPL-2.0-or-later
"""The worker as a process: what it may not do, how it ends, and what it leaves behind (nothing)."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from luksrotd.errors import EngineCrashed, EngineError, EngineTimeout, SecretRejected
from luksrotd.host.worker import Deadlines, WorkerEngine
from luksrotd.ports import SecretFd
from luksrotd.rotation.edits import AddKeyslot, Pbkdf
from tests.engine.processes import OPERATIONS, ended, interpreter, resources, worker
from tests.engine.shadow import memfd
from tests.support.makeimage import KEY

pytestmark = pytest.mark.asyncio

#: A key derivation of some hours.
ENDLESS = Pbkdf("pbkdf2", hash="sha512", iterations=2**31 - 1)


def proc(pid, name):
    return Path(f"/proc/{pid}", name).read_text()


def links(pid, *names):
    return [str(Path(f"/proc/{pid}", name).readlink()) for name in names]


def open_files(pid):
    return [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]


def status_of(pid):
    lines = proc(pid, "status").splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


def owner(pid):
    return Path(f"/proc/{pid}/environ").stat().st_uid


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def working(pid):
    """When the process has used a tenth of a second of processor time more than now."""

    def ticks():
        return int(proc(pid, "stat").rsplit(")", 1)[1].split()[11])

    start = ticks()
    async with asyncio.timeout(60):
        while ticks() < start + os.sysconf("SC_CLK_TCK") / 10:  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.01)


# -- what it may not do ------------------------------------------------------------------------------------------


async def test_privileges_are_gone(shadow):
    async with worker(shadow) as session:
        status = status_of(session.pid)
        user = status["Uid"].split()
        assert user == status["Gid"].split() == ["65534"] * 4
        assert status["Groups"] == ""
        assert status["NoNewPrivs"] == "1"
        assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
        assert proc(session.pid, "oom_score_adj") == "1000\n"
        kinds = ("ns/net", "ns/ipc", "ns/uts")
        assert not set(links(session.pid, *kinds)) & set(links("self", *kinds))
        # Not dumpable: its /proc entries are root's although it is not.
        assert owner(session.pid) == 0


async def test_limits(shadow):
    async with worker(shadow) as session:
        limits = proc(session.pid, "limits").splitlines()
        rows = {line[:26].strip(): line[26:].split()[:2] for line in limits}
        assert rows["Max core file size"] == ["0", "0"]
        assert rows["Max file size"] == [str(shadow.length)] * 2
        assert rows["Max open files"] == ["64", "64"]


async def test_nothing_but_what_it_needs_is_open(shadow, tmp_path):
    """Even if it was started with more, ours or somebody else's."""
    script = """
    import os, sys
    for fd in (os.open("/etc/passwd", os.O_RDONLY), os.memfd_create("foreign")):
        os.dup2(fd, fd + 50)
        os.set_inheritable(fd, True)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    """
    foreign = memfd()
    os.set_inheritable(foreign, True)
    try:
        async with worker(shadow, WorkerEngine(python=interpreter(tmp_path, script))) as session:
            await session.load()
            targets = open_files(session.pid)
    finally:
        os.close(foreign)
    kinds = {target.split(":[")[0] for target in targets}
    assert kinds == {
        "/dev/null",
        "socket",
        "/memfd:shadow (deleted)",
        "/memfd:luksrotd-worker-stderr (deleted)",
        "/dev/random",  # crypt_init opens both, and fails where it cannot
        "/dev/urandom",
    }


async def run(script, *arguments):
    """What the script prints; it must not complain."""
    command = [sys.executable, "-P", "-s", "-c", script, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(*command, **pipes, start_new_session=True)
    try:
        output, complaint = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert complaint.decode() == ""
    return output.decode()


CONFINED = """
import os, socket, sys
from luksrotd.worker.confine import confine
os.setgroups([0, 6])
confine(os.getppid())
assert os.getgroups() == [], "groups"
def fails(kind, function, *arguments):
    try:
        function(*arguments)
    except kind as error:
        return True
    return False
assert fails(PermissionError, os.open, sys.argv[1], os.O_RDONLY), "image"
assert fails(PermissionError, os.open, "/dev/loop0", os.O_RDONLY), "loop device"
assert fails(PermissionError, os.open, "/etc/shadow", os.O_RDONLY), "shadow"
assert fails(PermissionError, os.setuid, 0), "root again"
assert fails(PermissionError, os.kill, os.getppid(), 0), "signal to the parent"
assert [name for _, name in socket.if_nameindex()] == ["lo"], "interfaces"
with socket.socket() as probe:
    assert fails(OSError, probe.connect, ("127.0.0.1", 1)), "network"
    probe.settimeout(5)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    assert fails(OSError, probe.connect, ("192.0.2.1", 9)), "route"
print("confined")
"""


async def test_a_confined_process_reaches_nothing(image):
    image.chmod(0o600)
    assert await run(CONFINED, str(image)) == "confined\n"


UNPRIVILEGED = """
import os
from pathlib import Path
from luksrotd.cryptsetup._ffi import ffi, lib
from luksrotd.worker.confine import confine
os.setresgid(12345, 12345, 12345)
os.setresuid(12345, 12345, 12345)
lib.prctl(lib.PR_SET_DUMPABLE, ffi.cast("unsigned long", 1))  # as after exec
confine(os.getppid())
assert os.getresuid() == (12345, 12345, 12345), "user"
assert os.stat("/proc/self/environ").st_uid == 0, "dumpable"
assert "NoNewPrivs:\t1" in Path("/proc/self/status").read_text(), "privileges"
print("confined")
"""


async def test_without_root_the_rest_is_given_up(image):
    assert await run(UNPRIVILEGED) == "confined\n"


async def test_confinement_that_fails_is_told(shadow, tmp_path):
    """A worker whose parent is not who started it works for nobody."""
    script = "import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:-1], '1'])"
    engine = WorkerEngine(python=interpreter(tmp_path, script))
    with pytest.raises(EngineError, match=r"^cannot work: the parent has gone$"):
        async with worker(shadow, engine):
            pass


# -- how it ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
async def test_killed_in_an_operation(shadow, name):
    before = resources()
    async with worker(shadow) as session:
        os.kill(session.pid, signal.SIGSTOP)
        task = asyncio.create_task(OPERATIONS[name](session))
        await asyncio.sleep(0)
        os.kill(session.pid, signal.SIGKILL)
        with pytest.raises(EngineCrashed, match=r"^cannot go on: the worker was ended by SIGKILL$"):
            await task
        with pytest.raises(EngineError, match=r"after it failed"):
            await session.load()
    assert resources() == before


@pytest.mark.parametrize("name", OPERATIONS)
async def test_silent_in_an_operation(shadow, name):
    before = resources()
    async with worker(shadow, WorkerEngine(Deadlines(**{name: 0.05}))) as session:
        os.kill(session.pid, signal.SIGSTOP)
        with pytest.raises(EngineTimeout, match=rf"^cannot wait for {name} longer than 0.05 s$"):
            await OPERATIONS[name](session)
    assert not alive(session.pid)
    assert resources() == before


async def test_killed_in_key_derivation(shadow):
    async with worker(shadow) as session:
        await session.unlock()
        task = asyncio.create_task(session.apply([AddKeyslot(1, "new", ENDLESS)]))
        await working(session.pid)
        os.kill(session.pid, signal.SIGKILL)
        with pytest.raises(EngineCrashed):
            await task


async def test_cancelled_in_key_derivation(shadow):
    before, started = resources(), asyncio.get_running_loop().create_future()

    async def job():
        async with worker(shadow) as session:
            await session.unlock()
            started.set_result(session.pid)
            await session.apply([AddKeyslot(1, "new", ENDLESS)])

    task = asyncio.create_task(job())
    pid = await started
    await working(pid)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(pid)
    assert resources() == before


async def test_cancelled_at_every_step_of_the_start(shadow):
    """Each turn of the loop is a place at which a cancellation may arrive, twice over."""
    before = resources()

    async def job():
        async with worker(shadow) as session:
            await session.load()

    for turns in range(12):
        task = asyncio.create_task(job())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert resources() == before


async def test_a_cancelled_call_ends_the_session(shadow):
    """Its reply would else be taken for that of the next call."""
    async with worker(shadow) as session:
        await session.unlock()
        os.kill(session.pid, signal.SIGSTOP)
        task = asyncio.create_task(session.opens(0, "unlock"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        os.kill(session.pid, signal.SIGCONT)
        with pytest.raises(EngineError, match=r"after it failed"):
            await session.opens(3, "unlock")


async def test_dies_with_its_parent(image):
    """Also while it does not read its socket (it is stopped)."""
    script = """
    import asyncio, os, signal, sys
    from luksrotd.host.worker import WorkerEngine
    from tests.engine.shadow import PlainShadow
    async def main():
        async with WorkerEngine().session(PlainShadow(1 << 20), {}) as session:
            os.kill(session.pid, signal.SIGSTOP)
            print(session.pid, flush=True)
            await asyncio.Event().wait()
    asyncio.run(main())
    """
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", textwrap.dedent(script), stdout=subprocess.PIPE)
    try:
        pid = int(await parent.stdout.readline())
        pidfd = os.pidfd_open(pid)
    finally:
        parent.kill()
        await parent.communicate()
    await ended(pidfd)


# -- what it leaves behind ---------------------------------------------------------------------------------------


async def test_a_hundred_sessions_leave_nothing(shadow):
    async def job(number):
        with contextlib.suppress(SecretRejected):
            fd = memfd(KEY if number % 2 else b"")
            try:
                async with WorkerEngine().session(shadow, {"unlock": SecretFd(fd)}) as session:
                    if number % 4 == 1:
                        await session.load()
            finally:
                os.close(fd)

    await job(1)
    before = resources()
    for start in range(0, 100, 4):
        await asyncio.gather(*(job(number) for number in range(start, start + 4)))
    assert resources() == before
