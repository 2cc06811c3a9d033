# SPDX-License-Identifier: GPL-2.0-or-later
"""Keyslots that go, and the record of their areas, which outlives a power cut (invariant I6)."""

from collections.abc import Iterable, Mapping
from typing import Any

from luksrotd.errors import NoFreeKeyslot
from luksrotd.luks2 import layout
from luksrotd.luks2.areas import Extent
from luksrotd.records import dataclass
from luksrotd.rotation import token as tokens
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import DestroyKeyslot, Edit, RemoveToken, SetToken
from luksrotd.rotation.view import DeviceView


@dataclass(frozen=True, slots=True)
class Carrier:
    """The token of ours that stays, and carries the wipe intent meanwhile; ``body`` is how it is to look at the end."""

    token: int
    body: Mapping[str, Any]
    fingerprint_of: int | None = None


def retire(
    view: DeviceView,
    keyslots: Iterable[int],
    remove: Iterable[int] = (),
    *,
    carrier: Carrier | None = None,
    first: tuple[Edit, ...] = (),
    survivors: frozenset[int] | None = None,
    also: tuple[Extent, ...] = (),
) -> Change:
    """The change that removes the tokens ``remove``, makes the edits ``first``, then removes ``keyslots``.

    The wipe intent goes into the carrier, else into a wipe record of its own, which takes the number of a token that
    goes where there is one.  ``also``: further ranges for it.  Tokens go first: what they leave is room enough for the
    intent.  Raises ``NoFreeKeyslot`` if there is no number for it.
    """
    keyslots, remove = tuple(keyslots), tuple(remove)
    destroyed = tuple(DestroyKeyslot(keyslot) for keyslot in keyslots)
    removed = tuple(RemoveToken(token) for token in remove)
    areas = [*(view.metadata.keyslots[keyslot].area for keyslot in keyslots), *also]
    if carrier is not None:
        last = SetToken(carrier.token, dict(carrier.body), carrier.fingerprint_of)
        pending = SetToken(carrier.token, tokens.with_intent(carrier.body, areas), carrier.fingerprint_of)
        return Change((*removed, *first, pending, *destroyed), (last,) if areas else (), survivors=survivors)
    if not areas:
        return Change((*removed, *first), survivors=survivors)
    number = remove[0] if remove else _free_token(view, first)
    record = SetToken(number, tokens.record(areas))
    others = tuple(edit for edit in removed if edit.token != number)
    return Change((*others, *first, record, *destroyed), (RemoveToken(number),), survivors=survivors)


def _free_token(view: DeviceView, edits: Iterable[Edit]) -> int:
    taken = set(view.metadata.tokens) | {edit.token for edit in edits if isinstance(edit, SetToken)}
    for number in range(layout.TOKENS_MAX):
        if number not in taken:
            return number
    raise NoFreeKeyslot(
        f"cannot remove a keyslot: all {layout.TOKENS_MAX} tokens are taken, and one is needed to record that its area "
        "is to be wiped; remove a token first"
    )
