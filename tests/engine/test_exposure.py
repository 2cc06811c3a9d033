# SPDX-License-Identifier: GPL-2.0-or-later
"""A planted and a generated secret, looked for wherever a secret could slip out."""

import asyncio
import os
from pathlib import Path

import pytest

from luksrotd.errors import Internal
from luksrotd.host.worker import WorkerEngine
from luksrotd.ports import GenerateInto, SecretFd
from luksrotd.rotation.edits import PBKDF_FOR_RANDOM_KEYS, AddKeyslot
from tests.engine.shadow import memfd, shadow_of
from tests.support.makeimage import make_image


class RecordingLoop(asyncio.SelectorEventLoop):
    """Keeps what goes over every socket."""

    def __init__(self):
        super().__init__()
        self.traffic = bytearray()

    async def sock_sendall(self, sock, data):
        self.traffic += data
        await super().sock_sendall(sock, data)

    async def sock_recv(self, sock, size):
        data = await super().sock_recv(sock, size)
        self.traffic += data
        return data


PLANTED = b"hunter2-hunter2-hunter2"


def exposed(pid):
    """What others see of a process: arguments, environment, what it wrote to stderr."""
    return b"".join(Path(f"/proc/{pid}", name).read_bytes() for name in ("cmdline", "environ", "fd/2"))


def test_secrets_show_nowhere(tmp_path):
    """With a failure at the end, as errors are where secrets slip out."""
    planted = make_image(tmp_path / "planted", key=PLANTED, keyslots_size=1024 * 1024)
    shadow, new = shadow_of(planted), memfd()
    seen = bytearray()

    async def job():
        secrets = {"unlock": SecretFd(memfd(PLANTED)), "new": GenerateInto(new)}
        async with WorkerEngine().session(shadow, secrets) as session:
            await session.unlock()
            await session.apply([AddKeyslot(1, "new", PBKDF_FOR_RANDOM_KEYS)])
            assert await session.opens(1, "new")
            await session.load()
            seen.extend(exposed(session.pid))
            with pytest.raises(Internal) as caught:
                await session._call({"op": "opens"}, 60)
            seen.extend(repr([caught.value, *caught.value.__notes__]).encode())

    with asyncio.Runner(loop_factory=RecordingLoop) as runner:
        runner.run(job())
        seen += runner.get_loop().traffic
    generated = os.pread(new, 100, 0)
    assert b'"op":"unlock"' in seen
    assert b"luksrotd.worker" in seen
    assert b"Traceback" in seen
    assert len(generated) == 71
    for secret in (PLANTED, generated):
        for form in (secret, secret.hex().encode(), repr(secret)[2:-1].encode()):
            assert form not in seen
