# SPDX-License-Identifier: GPL-2.0-or-later
"""The seal on a worker: what it forbids, and that it is on every thread."""

import asyncio
import contextlib
import ctypes
import json
import os
import platform
import shlex
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from luksrotd.errors import EngineCrashed, EngineError
from luksrotd.host.worker import WorkerEngine
from luksrotd.ports import TokenSource
from luksrotd.rotation import wire
from luksrotd.rotation.edits import PBKDF_FOR_RANDOM_KEYS, UNLOCK, AddKeyslot, Pbkdf, to_wire
from tests.engine import probe
from tests.engine.conftest import ROOT
from tests.engine.processes import interpreter, worker
from tests.engine.shadow import memfd, shadow_of
from tests.support.makeimage import KEY, cryptsetup_opens, import_token, make_image
from tests.support.tokenplugin import TYPE

#: An Argon2 of some hours, with threads.
ENDLESS = Pbkdf("argon2id", memory_kib=65536, iterations=2**31 - 1, parallel=4)
#: By the file system, which says no; the others by the filter, which says that there is no such call.
OF_FILES = {
    *("read a file", "write a file", "read a folder", "read a block device", "write a block device"),
    *("write /dev/null", "write /proc", "read what systemd keeps for tokens"),
}
FOR_TOKENS = {"request_key", "read what systemd keeps for tokens"}
LOOP_MAJOR = 7


def run(*arguments):
    command = [sys.executable, "-P", "-s", *arguments]
    environment = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


@pytest.fixture(scope="module")
def everybody(tmp_path_factory):
    """A folder with a file and a block device that every user may read and write."""
    folder = tmp_path_factory.mktemp("everybody")
    for path in (folder, *folder.parents[:-2]):
        path.chmod(0o755)
    folder.chmod(0o777)
    (folder / "file").touch()
    (folder / "file").chmod(0o666)
    os.mknod(folder / "block", stat.S_IFBLK, os.makedev(LOOP_MAJOR, 0))
    (folder / "block").chmod(0o666)
    return folder


@pytest.fixture(scope="module")
def probed(everybody):
    """What came of each attempt, by kind of probe."""
    found = {}
    for kind in ("free", "sealed", "tokens"):
        done = run("-m", "tests.engine.probe", kind, str(everybody))
        assert done.stderr == ""
        found[kind] = json.loads(done.stdout)
    return found


# -- what is forbidden -------------------------------------------------------------------------------------------


def test_without_the_seal_the_attempts_get_through(probed):
    """Else their failure with it would prove nothing."""
    free = {name: outcome for name, outcome in probed["free"].items() if name not in probe.OPTIONAL}
    assert {name for name, outcome in free.items() if outcome in ("ENOSYS", "EACCES")} == set()
    assert {name for name in OF_FILES | {"fork", "unshare", "mmap", "AF_UNIX"} if free[name] != "done"} == set()


@pytest.mark.parametrize("kind", ["sealed", "tokens"])
def test_sealed_all_of_them_fail(probed, kind):
    through = {"AF_ALG"} | (FOR_TOKENS if kind == "tokens" else set())
    outcomes = {name: outcome for name, outcome in probed[kind].items() if name not in through}
    assert {name for name in outcomes if outcomes[name] == "EACCES"} == OF_FILES - through
    assert {outcome for name, outcome in outcomes.items() if name not in OF_FILES} == {"ENOSYS"}


def test_what_only_tokens_need(probed):
    assert {name for name in FOR_TOKENS if probed["tokens"][name] != probed["free"][name]} == set()


@pytest.mark.parametrize("kind", ["sealed", "tokens"])
def test_the_filter_has_nothing_against_the_kernels_ciphers(probed, kind):
    assert probed[kind]["AF_ALG"] == probed["free"]["AF_ALG"]


def test_calls_of_another_abi_are_the_end():
    """By x32 on amd64, the filter could be evaded: its numbers are others."""
    if platform.machine() != "x86_64":
        return
    script = """
import ctypes, os
from luksrotd.worker.seal import seal
libc = ctypes.CDLL(None)
seal(tokens=False)
libc.syscall(ctypes.c_long(0x40000000 | 39))
"""
    assert run("-c", script).returncode == -signal.SIGSYS
    assert run("-c", script.replace("seal(tokens", "bool(tokens")).returncode != -signal.SIGSYS


def tasks(pid):
    return list(Path(f"/proc/{pid}/task").iterdir())


def status(task):
    lines = Path(task, "status").read_text().splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


@pytest.mark.asyncio
async def test_every_thread_is_sealed(shadow):
    async with worker(shadow) as session:
        await session.unlock()
        deriving = asyncio.create_task(session.apply([AddKeyslot(1, "new", ENDLESS)]))
        async with asyncio.timeout(60):
            while len(found := tasks(session.pid)) < 2:  # noqa: ASYNC110 - no event tells it
                await asyncio.sleep(0.01)
        statuses = [status(task) for task in found]
        deriving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await deriving
    assert {(each["Seccomp"], each["NoNewPrivs"], each["Uid"].split()[0]) for each in statuses} == {("2", "1", "65534")}


#: What code within a worker, which a header might have brought to run, tries; and what it gets.
FROM_WITHIN = {
    "read:{}/block": "EACCES",
    "write:{}/block": "EACCES",
    "read:{}/file": "EACCES",
    "write:{}/file": "EACCES",
    "socket": "ENOSYS",
    "fork": "ENOSYS",
    "execute:/bin/true": "ENOSYS",
}
UNSEALED = """
import runpy, sys
from luksrotd.worker import session
session.seal = lambda *, tokens: None
sys.argv = sys.argv[sys.argv.index("-m") + 1 :]
runpy.run_module("luksrotd.worker", run_name="__main__")
"""


@pytest.mark.asyncio
@pytest.mark.usefixtures("token_plugin")
@pytest.mark.parametrize("sealed", [True, False])
async def test_what_a_worker_that_was_taken_over_can_do(everybody, tmp_path, sealed):
    image = make_image(tmp_path / "image", keyslots_size=1024 * 1024)
    for number, attempt in enumerate(FROM_WITHIN):
        import_token(image, {"type": TYPE, "keyslots": ["0"], "attempt": attempt.format(everybody)}, number)
    engine = WorkerEngine() if sealed else WorkerEngine(python=interpreter(tmp_path, UNSEALED))
    came = {}
    with contextlib.closing(shadow_of(image)) as shadow:
        for number, attempt in enumerate(FROM_WITHIN):
            async with engine.session(shadow, {UNLOCK: TokenSource(number)}) as session:
                with pytest.raises((EngineError, EngineCrashed)) as caught:
                    await session.unlock()
            came[attempt] = caught.value.message.rpartition(": ")[2]
    succeeded = dict.fromkeys(FROM_WITHIN, "EXFULL")
    # It is another program then, and ends.
    succeeded["execute:/bin/true"] = "the worker ended with status 0"
    assert came == (FROM_WITHIN if sealed else succeeded)


# -- when it cannot be had ---------------------------------------------------------------------------------------


def injected(tmp_path, *injections):
    """An interpreter whose system calls fail as told."""
    options = shlex.join([option for injection in injections for option in ("-e", f"inject={injection}")])
    path = tmp_path / "injected"
    path.write_text(f'#!/bin/sh\nexec strace -D -f -o /dev/null {options} {shlex.quote(sys.executable)} "$@"\n')
    path.chmod(0o755)
    return WorkerEngine(python=str(path))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("call", "named"),
    [
        ("seccomp", "seccomp_load"),
        ("landlock_add_rule", "landlock_add_rule"),
        ("landlock_restrict_self", "landlock_restrict_self"),
        ("setgroups", "setgroups"),
        ("setresgid", r"setresgid to \d+"),
        ("setresuid", r"setresuid to \d+"),
        ("prctl", r"prctl \d+"),
    ],
)
async def test_no_worker_works_unsealed_and_the_error_names_the_call(shadow, tmp_path, call, named):
    with pytest.raises(EngineError, match=rf"^cannot confine the worker: {named}: Invalid argument$"):
        async with worker(shadow, injected(tmp_path, f"{call}:error=EINVAL")):
            pass


@pytest.mark.asyncio
async def test_a_sandbox_that_has_no_seccomp_call_is_none_the_worse(shadow, tmp_path):
    """Services under systemd 252's @system-service; libseccomp then takes prctl(2)."""
    async with worker(shadow, injected(tmp_path, "seccomp:error=EPERM")) as session:
        assert await session.unlock() == 0
        assert status(f"/proc/{session.pid}")["Seccomp"] == "2"


@pytest.mark.asyncio
@pytest.mark.parametrize("error", ["ENOSYS", "EOPNOTSUPP", "EPERM"])
async def test_without_landlock_the_filter_remains(shadow, tmp_path, error):
    async with worker(shadow, injected(tmp_path, f"landlock_create_ruleset:error={error}")) as session:
        assert await session.unlock() == 0
        assert status(f"/proc/{session.pid}")["Seccomp"] == "2"


def test_an_architecture_whose_calls_hide_their_arguments_is_refused():
    script = """
from luksrotd.cryptsetup import seccomp
from luksrotd.errors import EngineError
from luksrotd.worker.seal import seal
seccomp._UNLIKE_OTHERS = (seccomp.lib.seccomp_arch_native(),)
try:
    seal(tokens=False)
except EngineError as error:
    print(error.message, end="")
"""
    assert run("-c", script).stdout == "cannot confine the worker: Operation not supported"


# -- what must work ----------------------------------------------------------------------------------------------


@pytest.fixture
def key_of_the_session():
    """KEY in the session keyring; its description."""
    libc = ctypes.CDLL(None, use_errno=True)
    description = f"luksrotd-test-{os.getpid()}"
    number = probe.lib.seccomp_syscall_resolve_name
    session = ctypes.c_long(-3)
    key = libc.syscall(ctypes.c_long(number(b"add_key")), b"user", description.encode(), KEY, len(KEY), session)
    assert key > 0, os.strerror(ctypes.get_errno())
    yield description
    unlink = 9
    assert libc.syscall(ctypes.c_long(number(b"keyctl")), unlink, ctypes.c_long(key), session) == 0


@pytest.mark.asyncio
async def test_a_token_of_the_keyring_unlocks(tmp_path, key_of_the_session):
    image = make_image(tmp_path / "image", keyslots_size=1024 * 1024)
    import_token(image, {"type": "luks2-keyring", "keyslots": ["0"], "key_description": key_of_the_session}, 0)
    shadow = shadow_of(image)
    with contextlib.closing(shadow):
        async with WorkerEngine().session(shadow, {UNLOCK: TokenSource(0)}) as session:
            assert await session.unlock() == 0


#: Serves a socket as a worker of a user that is not root, who could not start Python wherever it may lie.
ORDINARY = """
import os, socket, sys
from luksrotd.cryptsetup._ffi import ffi, lib
from luksrotd.worker.confine import confine
from luksrotd.worker.serve import serve
from luksrotd.worker.session import Session
control = int(sys.argv[1])
os.setgroups([])
os.setresgid(12345, 12345, 12345)
os.setresuid(12345, 12345, 12345)
lib.prctl(lib.PR_SET_DUMPABLE, ffi.cast("unsigned long", 1))  # as after exec
os._exit(serve(control, os.getppid(), Session, confine))
"""


def test_a_worker_of_an_ordinary_user_works_sealed(shadow, tmp_path):
    ours, theirs = socket.socketpair()
    fds = [shadow.fd, memfd(KEY), memfd(b"a new key")]
    environment = {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-s", "-c", ORDINARY, str(theirs.fileno())]
    secrets = {"unlock": {"fd": 1, "limit": 100}, "new": {"fd": 2, "limit": 100}}
    edits = [to_wire(AddKeyslot(1, "new", PBKDF_FOR_RANDOM_KEYS))]
    requests = [
        {"op": "start", "shadow": 0, "secrets": secrets, "secret_seconds": 60},
        {"op": "load"},
        {"op": "unlock", "keyslot": None, "volume_key": False},
        {"op": "apply", "edits": edits},
        {"op": "opens", "keyslot": 1, "secret": "new"},
    ]
    pass_fds = (theirs.fileno(),)
    with ours, ours.makefile("rb") as lines, subprocess.Popen(command, pass_fds=pass_fds, env=environment) as process:
        theirs.close()
        results = []
        for request in requests:
            socket.send_fds(ours, [wire.encode(request)], [] if results else fds)
            results.append(wire.result_of(lines.readline()))
        found = status(f"/proc/{process.pid}")
        ours.shutdown(socket.SHUT_WR)
        assert process.wait(60) == 0
    for fd in fds[1:3]:
        os.close(fd)
    assert (results[2], results[4]) == (0, True)
    assert (found["Seccomp"], found["Uid"].split()[0]) == ("2", "12345")
    assert cryptsetup_opens(shadow.save(tmp_path / "result"), b"a new key", 1)
