# SPDX-License-Identifier: GPL-2.0-or-later
"""libcryptsetup's metadata lock is never held while a worker is at work: keys are derived then, which takes seconds.

At every call of a worker, before it, while it runs and behind it, another open file description gets the lock,
exclusively and at once.
"""

import asyncio
import fcntl
import os
import shutil
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from luksrotd import direct
from luksrotd.host.locks import HostLocks
from luksrotd.host.worker import WorkerEngine
from luksrotd.luks2.layout import Which
from luksrotd.ports import DeviceRef
from luksrotd.rotation.edits import NEW, UNLOCK, Pbkdf
from luksrotd.service.draft import begin
from luksrotd.service.transaction import Transactor
from luksrotd.service.volume import Volumes
from tests.contract.conftest import loop_device
from tests.support import forge
from tests.support.makeimage import KEY, make_image
from tests.support.simulation import run, secrets

CHEAP = Pbkdf("pbkdf2", iterations=1000)
OLD, NEXT = b"the old backup key", b"the new backup key"
FOREVER = 3600.0


class Probing:
    """A ``KeyslotEngine`` whose every call is watched; ``probe`` raises if the metadata lock is not free."""

    def __init__(self, probe):
        self.probe = probe
        self.calls = []

    @asynccontextmanager
    async def session(self, shadow, secrets):
        self.probe()
        self.calls.append("session")
        async with WorkerEngine().session(shadow, secrets) as session:
            yield _Watched(self, session)


class _Watched:
    def __init__(self, engine, session):
        self._engine, self._session = engine, session

    def __getattr__(self, name):
        call = getattr(self._session, name)

        async def watched(*arguments):
            self._engine.probe()
            self._engine.calls.append(name)
            running = asyncio.ensure_future(call(*arguments))
            await asyncio.sleep(0)  # the request is sent
            while not running.done():
                self._engine.probe()
                await asyncio.wait([running], timeout=0.005)
            self._engine.probe()
            return await running

        return watched


class Bench:
    """A volume on the real host."""

    def __init__(self, path, directory):
        self.path = str(path)
        self.ref = DeviceRef(self.path)
        self.cryptsetup = directory / "cryptsetup"
        self.cryptsetup.mkdir(0o700)
        locks = HostLocks(runtime=str(directory), cryptsetup=str(self.cryptsetup), lock_wait=FOREVER)
        self.engine = Probing(self.probe)
        self.host = replace(direct.build_host(journal=direct.NoJournal(), locks=locks), engine=self.engine)
        self.volumes = Volumes(self.host)
        self.probes = 0

    def probe(self):
        """Whether the lock is free: the file itself of an image, the only file in the lock directory of a device."""
        self.probes += 1
        paths = [*self.cryptsetup.iterdir()] if self.path.startswith("/dev/") else [Path(self.path)]
        for path in paths:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pytest.fail("the metadata lock is held while a worker is at work")
            finally:
                os.close(fd)

    def alter(self, edit):
        """Change the header behind everybody's back; ``edit`` is of ``tests.support.forge``."""
        with Path(self.path).open("r+b") as device:
            content = edit(device.read())
            device.seek(0)
            device.write(content[:32768])


def call(bench, verb, data=None, **named):
    with secrets(**named) as sources:
        more = {} if data is None else {"data": data, "pbkdf": CHEAP}
        return run(getattr(bench.volumes, verb)(bench.ref, *([sources] if sources else []), **more))


def recreate(bench):
    bench.alter(lambda image: forge.edited(image, lambda raw: raw["tokens"].clear()))
    call(bench, "recreate", {"of": 1}, **{UNLOCK: OLD})


def recreate_pair(bench):
    call(bench, "remove", **{UNLOCK: KEY})
    call(bench, "recreate", {"of": 1}, **{UNLOCK: KEY, NEW: NEXT})


def stage_and_finish(bench):
    call(bench, "stage", {"of": 2}, **{UNLOCK: KEY, NEW: NEXT})
    call(bench, "finish")


def stage_and_abort(bench):
    call(bench, "stage", {"of": 2}, **{UNLOCK: KEY, NEW: NEXT})
    call(bench, "abort")


def draft(bench):
    async def compose(sources):
        transaction = await begin(bench.host, bench.ref)
        transaction.draft.add_keyslot("first", CHEAP)
        transaction.draft.add_keyslot("second", CHEAP)
        transaction.draft.set_token({"type": "note", "keyslots": []})
        await transaction.commit(sources)

    with secrets(**{UNLOCK: KEY, "first": b"first", "second": b"second"}) as sources:
        run(compose(sources))


def reconcile(bench):
    bench.alter(lambda image: forge.keyslot_removed(forge.unsealed(image, Which.SECONDARY), 1))
    bench.alter(lambda image: forge.unsealed(image, Which.PRIMARY))
    assert run(bench.volumes.reconcile(bench.ref)).left == ()


VERBS = {
    "enroll": lambda bench: None,  # every bench has begun with it
    "rotate": lambda bench: call(bench, "rotate", {"of": 2}, **{UNLOCK: KEY, NEW: NEXT}),
    "stage and finish": stage_and_finish,
    "stage and abort": stage_and_abort,
    "remove, and recreate the pair": recreate_pair,
    "recreate the token": recreate,
    "draft": draft,
    "reconcile": reconcile,
}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return make_image(tmp_path_factory.mktemp("lock-free") / "image", keyslots_size=1024 * 1024, size=4 * 1024 * 1024)


@contextmanager
def enrolled(template, directory, kind):
    image = shutil.copy(template, directory / "image")
    if kind == "image":
        bench = Bench(image, directory)
        call(bench, "enroll", {"of": 1}, **{UNLOCK: KEY, NEW: OLD})
        yield bench
        return
    with loop_device(image) as node:
        bench = Bench(node, directory)
        call(bench, "enroll", {"of": 1}, **{UNLOCK: KEY, NEW: OLD})
        yield bench


@pytest.mark.parametrize("kind", ["image", "loop device"])
@pytest.mark.parametrize("verb", VERBS)
def test_nobody_waits_for_a_key_derivation(template, tmp_path, verb, kind):
    with enrolled(template, tmp_path, kind) as bench:
        VERBS[verb](bench)
        assert {"session", "load", "unlock", "apply", "opens"} <= set(bench.engine.calls)
        assert bench.probes > 2 * len(bench.engine.calls) - bench.engine.calls.count("session")


@pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])
@pytest.mark.parametrize("kind", ["image", "loop device"])
def test_a_lock_that_is_taken_before_the_derivation_is_seen(monkeypatch, template, tmp_path, kind, exclusive):
    original = Transactor._attempt

    async def attempt(self, target, *arguments):
        async with self._host.locks.metadata(target.device, exclusive=exclusive):
            return await original(self, target, *arguments)

    with enrolled(template, tmp_path, kind) as bench:
        monkeypatch.setattr(Transactor, "_attempt", attempt)
        with pytest.raises(pytest.fail.Exception, match="the metadata lock is held"):
            VERBS["rotate"](bench)
