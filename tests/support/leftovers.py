# SPDX-License-Identifier: GPL-2.0-or-later
"""What a power cut leaves behind, counted alike for our operations and for those of other tools.

Everything is seen as libcryptsetup sees it after its own recovery; who opens a keyslot, it has tried.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from luksrotd.errors import EngineError, LuksrotdError
from luksrotd.luks2 import layout
from luksrotd.luks2.areas import Extent
from tests.support.crash import Image
from tests.support.crashverbs import described
from tests.support.oracle import Libcryptsetup, Loaded

#: Secrets that somebody remembers; all others are backup keys, which only their token can lead to.
REMEMBERED = frozenset({"main", "other"})


class Leftover(StrEnum):
    """The kinds, as the table prints them."""

    LOST = "device lost, or the main passphrase"
    NO_BACKUP = "no backup key that a token leads to"
    LEAKED = "keyslot without a token"
    TWO_PAIRS = "two live pairs"
    OTHER_KEY = "token that describes another key"
    DANGLING = "dangling token"
    DEAD = "keyslot that is listed, and dead"
    INTACT = "old key's area intact, and nothing says so"
    GHOST = "area of a key that never was in force"


#: One thing that is wrong: the kind, and which keyslot, token or area it is about.
Instance = tuple[Leftover, str]


@dataclass(slots=True)
class Tally:
    """How many states were seen, and in how many of them each kind was found."""

    states: int = 0
    found: Counter[Leftover] = field(default_factory=Counter)

    def add(self, instances: frozenset[Instance]) -> None:
        """One state."""
        self.states += 1
        self.found.update({kind for kind, _ in instances})


class Classifier:
    """Says what is wrong with states of one operation.

    What was wrong before the operation is not counted; nor, with ``intended``, what its undisturbed end has: two pairs
    after a transaction that has made two.
    """

    def __init__(self, tool: Libcryptsetup, before: Image, after: Image, *, intended: bool) -> None:
        self._tool = tool
        tool.learn([before, after])
        first, last = tool.load(before), tool.load(after)
        self._old = self._areas(before, first)
        self._new = {area: found for area, found in self._areas(after, last).items() if area not in self._old}
        self._backed_up = all(_leads_to_backup(end) for end in (first, last))
        self._excused: frozenset[Instance] = frozenset()
        self._excused = self.classify(before) | (self.classify(after) if intended else frozenset())

    def classify(self, image: Image) -> frozenset[Instance]:
        """What is wrong with this state, and was not before."""
        try:
            loaded = self._tool.load(image)
        except EngineError:
            return frozenset({(Leftover.LOST, "device")})
        return frozenset(self._instances(loaded)) - self._excused

    def _instances(self, loaded: Loaded) -> Iterator[Instance]:
        raw, owners = loaded.raw, loaded.keyslots
        named = {int(slot) for token in raw["tokens"].values() for slot in token["keyslots"]}
        if "main" not in owners.values():
            yield Leftover.LOST, "main"
        if self._backed_up and not _leads_to_backup(loaded):
            yield Leftover.NO_BACKUP, "token"
        for slot, owner in owners.items():
            if owner is None:
                yield Leftover.DEAD, f"keyslot {slot}"
            elif owner not in REMEMBERED and slot not in named:
                yield Leftover.LEAKED, f"keyslot {slot} ({owner})"
        for number, token in raw["tokens"].items():
            if not token["keyslots"] and "wipe" not in token:
                yield Leftover.DANGLING, f"token {number} ({token['type']})"
            live = {owners[int(slot)] for slot in token["keyslots"]} - {None}
            if described(token) is not None and live - {described(token)}:
                yield Leftover.OTHER_KEY, f"token {number}"
        for name, pairs in _live_pairs(loaded).items():
            if len(pairs) > 1:
                yield Leftover.TWO_PAIRS, f"{name}: {', '.join(sorted(pairs))}"
        yield from self._remains(loaded)

    def _remains(self, loaded: Loaded) -> Iterator[Instance]:
        """Key material that nothing references any more, or not yet."""
        areas = [_area(slot) for slot in loaded.raw["keyslots"].values()]
        recorded = [
            Extent(int(entry["offset"]), int(entry["size"]))
            for token in loaded.raw["tokens"].values()
            for entry in token.get("wipe", ())
        ]
        for kind, there in ((Leftover.INTACT, self._old), (Leftover.GHOST, self._new)):
            for area, material in there.items():
                free = not any(area.overlaps(other) for other in areas)
                unsaid = free and not any(other.contains(area) for other in recorded)
                if unsaid and _digest(loaded.image, area) == material:
                    yield kind, f"area at {area.offset}"

    def _areas(self, image: Image, loaded: Loaded) -> dict[Extent, str]:
        """The material of each keyslot."""
        return {_material(slot): _digest(image, _material(slot)) for slot in loaded.raw["keyslots"].values()}


def tally(classifier: Classifier, images: Iterator[Image]) -> Tally:
    """Over all states."""
    counted = Tally()
    for image in images:
        try:
            counted.add(classifier.classify(image))
        except LuksrotdError:
            counted.add(frozenset({(Leftover.LOST, "device")}))
    return counted


def _live_pairs(loaded: Loaded) -> dict[str, set[str]]:
    """Backup keys that open and that a token in force names, by what tells them apart from other keys."""
    pairs: dict[str, set[str]] = {}
    for token in loaded.raw["tokens"].values():
        if token.get("state", "active") != "active":
            continue
        owners = {loaded.keyslots[int(slot)] for slot in token["keyslots"]}
        live = {owner for owner in owners if owner is not None and owner not in REMEMBERED}
        pairs.setdefault(str(token.get("name", token["type"])), set()).update(live)
    return pairs


def _leads_to_backup(loaded: Loaded) -> bool:
    """Whether some token names a live keyslot whose key it describes, or, where it describes none, any backup key."""
    for token in loaded.raw["tokens"].values():
        owners = {loaded.keyslots[int(slot)] for slot in token["keyslots"]} - {None}
        wanted = described(token)
        if wanted in owners if wanted is not None else owners - REMEMBERED:
            return True
    return False


def _area(slot: Mapping[str, Any]) -> Extent:
    return Extent(int(slot["area"]["offset"]), int(slot["area"]["size"]))


def _material(slot: Mapping[str, Any]) -> Extent:
    """The part of an area that has key material."""
    area = _area(slot)
    return Extent(area.offset, min(area.size, int(slot["key_size"]) * layout.STRIPES))


def _digest(image: Image, area: Extent) -> str:
    return hashlib.blake2b(image.read(area.offset, area.size)).hexdigest()
