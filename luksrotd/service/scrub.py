# SPDX-License-Identifier: GPL-2.0-or-later
"""Overwrite all unreferenced keyslot space, in short transactions: nobody waits long for the metadata lock."""

from luksrotd.ports import DeviceRef
from luksrotd.records import dataclass
from luksrotd.rotation import policy, scrub
from luksrotd.rotation.change import Change
from luksrotd.rotation.protocol import Phase
from luksrotd.rotation.view import DeviceView
from luksrotd.service.cancellation import heed_cancellation
from luksrotd.service.progress import Progress, Stage
from luksrotd.service.transaction import Transactor


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """How many bytes of which volume have been overwritten, and its sequence number, which stays as it is."""

    bytes: int
    uuid: str
    seqid: int


async def run(
    transactor: Transactor,
    ref: DeviceRef,
    progress: Progress,
    *,
    only_at: int | None = None,
    piece: int = scrub.PIECE_MAX,
) -> Scrubbed:
    """Overwrite what neither header copy references, ``piece`` bytes in each transaction.

    What is free is found out anew for each, and whether the header is at sequence number ``only_at``.  A cancel takes
    effect between two of them.  Raises what a transaction raises; the header is never changed, and what was overwritten
    before stays so.
    """
    seen = await transactor.look(ref)
    ref = DeviceRef(ref.path, ref.header, seen.uuid)
    start, written = 0, 0

    def step(entered: Stage | Phase) -> None:
        if entered is not Stage.DONE:
            progress(entered)

    def decide(now: DeviceView) -> Change:
        policy.check_sequence(now, only_at)
        return scrub.scrub(now, start, piece)

    while True:
        done = await transactor.run(ref, decide, {}, step)
        heed_cancellation()
        if not done.change.wipe:
            progress(Stage.DONE)
            return Scrubbed(written, seen.uuid, done.seqid_after)
        start = done.change.wipe[-1].end
        written += sum(extent.size for extent in done.change.wipe)
