# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m tests.support.stepdriver VERB IMAGE ENGINE``: one use case in a process of its own, to be traced.

The secrets are the well-known ones of ``tests.support.simulation``; the time stands still.
"""

import asyncio
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from luksrotd import direct
from luksrotd.host.live import LiveWorkerEngine
from luksrotd.names import STEPWISE
from luksrotd.ports import DeviceRef, SecretFd
from luksrotd.service.stepwise import StepwiseVolumes
from luksrotd.service.volume import KeyChange, Volumes
from tests.support.simhost import SimClock, SimInventories
from tests.support.simulation import CHEAP, MAIN, NEW, OLD, secrets

VERBS: Final = ("enroll", "rotate", "stage", "finish", "abort", "remove")


def volumes(engine: str) -> Volumes:
    """The use cases of that engine, with real libcryptsetup."""
    host = direct.build_host(journal=direct.NoJournal())
    host = replace(host, clock=SimClock(), inventories=SimInventories())
    return StepwiseVolumes(host, LiveWorkerEngine()) if engine == STEPWISE else Volumes(host)


async def operate(used: Volumes, verb: str, path: str, sources: Mapping[str, SecretFd]) -> KeyChange:
    """Do ``verb`` with the key named "backup"; ``sources`` has ``main``, ``old`` and ``new``."""
    ref = DeviceRef(path)
    unlock = {"unlock": sources["main"]}
    match verb:
        case "enroll":
            return await used.enroll(ref, {**unlock, "new": sources["old"]}, data={"ref": "vault/1"}, pbkdf=CHEAP)
        case "rotate":
            return await used.rotate(ref, {**unlock, "new": sources["new"]}, data={"ref": "vault/2"}, pbkdf=CHEAP)
        case "stage":
            return await used.stage(ref, {**unlock, "new": sources["new"]}, data={"ref": "vault/2"}, pbkdf=CHEAP)
        case "finish":
            return await used.finish(ref)
        case "abort":
            return await used.abort(ref)
        case "remove":
            return await used.remove(ref, unlock)
        case _:
            raise AssertionError(verb)


def run(engine: str, verb: str, path: str) -> KeyChange:
    """The same, in this process."""
    with secrets(main=MAIN, old=OLD, new=NEW) as sources:
        return asyncio.run(operate(volumes(engine), verb, path, sources))


if __name__ == "__main__":
    run(sys.argv[3], sys.argv[1], sys.argv[2])
