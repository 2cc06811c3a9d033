# SPDX-License-Identifier: GPL-2.0-or-later
"""A process of ours: one managed key through several changes, each tried until it is through.

``python -m tests.concurrency.driver PATH NAME ROUNDS``; a line of JSON for each attempt goes to standard output.
Secrets are ``secret(name, number)``: 0 at the enrolment, one more with each generation.
"""

import asyncio
import json
import sys

from luksrotd import direct
from luksrotd.errors import BusyError
from luksrotd.host.locks import HostLocks
from luksrotd.ports import DeviceRef
from luksrotd.rotation.edits import NEW, UNLOCK, Pbkdf
from luksrotd.service.volume import Volumes
from tests.support.makeimage import KEY
from tests.support.simulation import secrets

CHEAP = Pbkdf("pbkdf2", iterations=1000)
FOREVER = 3600.0


def secret(name, generation):
    """Of that generation of a key."""
    return f"{name} {generation}".encode()


async def main(path, name, rounds):
    """Enrol, then rotate, change the data, stage and finish, ``rounds`` times."""
    host = direct.build_host(
        journal=direct.NoJournal(), locks=HostLocks(job_wait=FOREVER, lock_wait=FOREVER), engine=None
    )
    volumes, ref = Volumes(host), DeviceRef(path)
    generation = 1
    await through("enroll", volumes.enroll, ref, name, 1)
    for _ in range(rounds):
        generation += 1
        await through("rotate", volumes.rotate, ref, name, generation)
        await through("set-data", volumes.set_data, ref, name, None, {"of": generation, "moved": True})
        generation += 1
        await through("stage", volumes.stage, ref, name, generation)
        await through("finish", volumes.finish, ref, name, None)


async def through(verb, use_case, ref, name, generation, *arguments):
    """Try until it is through; each attempt is told."""
    while True:
        with secrets(**({UNLOCK: KEY, NEW: secret(name, generation)} if generation else {})) as sources:
            more = {"data": {"of": generation}, "pbkdf": CHEAP} if generation else {}
            try:
                done = await use_case(ref, *([sources] if sources else arguments), name=name, **more)
            except BusyError as error:
                tell(verb=verb, error=error.code, outcome=error.outcome)
                continue
        tell(verb=verb, generation=done.generation, before=done.seqid_before, after=done.seqid_after)
        return


def tell(**fields):
    """One line."""
    sys.stdout.write(json.dumps(fields) + "\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
