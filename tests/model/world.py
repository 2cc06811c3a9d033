# SPDX-License-Identifier: GPL-2.0-or-later
"""What a volume is to those who use it: which secrets open it, which keys are managed, what else is there.

The model says which worlds a volume may be in; ``observe`` says in which one a header copy, alone, is.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from luksrotd.luks2.pair import HeaderCopy, Pair
from luksrotd.names import TOKEN_TYPE, WIPE_TOKEN_TYPE
from luksrotd.rotation.view import view

#: The secrets that open a keyslot of a copy, by its number.
Openers = Callable[[HeaderCopy], Mapping[int, str]]
LOST = ""


@dataclass
class Key:
    """One generation of a managed key: the name of its secret (``LOST``: its keyslot is gone), its data."""

    generation: int
    secret: str
    ref: str


@dataclass
class World:
    """``opens``: the names of the secrets that open, each by one keyslot; there are no other keyslots.

    ``active`` and ``staged``: managed keys by name.  ``tokens``: other tools' tokens.
    """

    opens: set[str] = field(default_factory=set)
    active: dict[str, Key] = field(default_factory=dict)
    staged: dict[str, Key] = field(default_factory=dict)
    tokens: dict[int, dict[str, Any]] = field(default_factory=dict)
    label: str = ""

    @property
    def managed(self) -> set[str]:
        """The secrets that a token of ours describes."""
        return {key.secret for key in (*self.active.values(), *self.staged.values())} - {LOST}

    @property
    def ordinary(self) -> set[str]:
        """The other ones."""
        return self.opens - self.managed

    def after(self, change: Callable[["World"], object]) -> "World":
        """Another one, changed."""
        other = copy.deepcopy(self)
        change(other)
        return other


def observe(found: HeaderCopy, pair: Pair, openers: Openers) -> World:
    """The world that one header copy shows; a keyslot that nothing opens counts as ``"?"`` and its number."""
    secrets = dict(openers(found))
    opens = {secrets.get(number, f"? {number}") for number in found.metadata.keyslots}
    world = World(opens, label=found.header.label)
    for key in view(Pair(found, found, pair.raw)).keys:
        secret = secrets.get(key.keyslot.id, f"? {key.keyslot.id}") if key.keyslot else LOST
        name = key.token.name
        there = world.staged if key.token.state == "staged" else world.active
        if name in there:
            name = f"second {name}"
        there[name] = Key(key.token.generation, secret, key.token.data["ref"])
    ours = (TOKEN_TYPE, WIPE_TOKEN_TYPE)
    world.tokens = {
        number: dict(token.raw) for number, token in found.metadata.tokens.items() if token.type not in ours
    }
    return world
