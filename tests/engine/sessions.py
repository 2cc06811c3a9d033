# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions as most tests need them: the key of the image, and a new one."""

import contextlib
import os

from luksrotd.host.worker import WorkerEngine
from luksrotd.ports import SecretFd
from luksrotd.rotation.edits import (
    PBKDF_FOR_RANDOM_KEYS,
    AddKeyslot,
)
from tests.engine.shadow import memfd
from tests.support.makeimage import (
    KEY,
)

NEW = b"the new key\n\0with odd bytes"
AREA = 258048
TOKEN = {"type": "luksrotd", "keyslots": ["1"]}


@contextlib.asynccontextmanager
async def worker(shadow, unlock=KEY, new=NEW):
    secrets = {"unlock": SecretFd(memfd(unlock)), "new": SecretFd(memfd(new))}
    with contextlib.ExitStack() as stack:
        for source in secrets.values():
            stack.callback(os.close, source.fd)
        async with WorkerEngine().session(shadow, secrets) as session:
            yield session


def add(keyslot, pbkdf=PBKDF_FOR_RANDOM_KEYS):
    return AddKeyslot(keyslot, "new", pbkdf)
