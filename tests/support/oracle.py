# SPDX-License-Identifier: GPL-2.0-or-later
"""What real libcryptsetup makes of a crash state: of the whole, and of each valid copy alone."""

import json
import os
from collections.abc import Hashable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from luksrotd.cryptsetup.api import Context
from luksrotd.cryptsetup.memory import SafeMemory
from luksrotd.errors import EngineError, LuksrotdError
from luksrotd.luks2 import layout
from luksrotd.luks2.layout import Which
from luksrotd.luks2.pair import Pair
from luksrotd.names import TOKEN_TYPE, WIPE_TOKEN_TYPE
from tests.support.crash import Image
from tests.support.crashjudge import pair_of

Raw = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A state as libcryptsetup sees it, after its own recovery.

    ``image`` is the device then; ``keyslots`` tells which secret, by its name, opens each keyslot, ``None`` for none.
    """

    image: Image
    raw: Raw
    keyslots: Mapping[int, str | None]

    @property
    def meaning(self) -> tuple[str, Hashable]:
        """What it says, wipe intents left out, and who opens it."""
        tokens = {
            number: {k: v for k, v in token.items() if token["type"] != TOKEN_TYPE or k != "wipe"}
            for number, token in self.raw["tokens"].items()
            if token["type"] != WIPE_TOKEN_TYPE
        }
        return json.dumps({**self.raw, "tokens": tokens}, sort_keys=True), frozenset(self.keyslots.items())


class Tool(Protocol):
    """Who has loaded a header."""

    def metadata(self) -> Raw:
        """What it says."""
        ...

    def opens(self, passphrase: SafeMemory, keyslot: int) -> bool:
        """Whether the keyslot takes it."""
        ...


class Libcryptsetup(AbstractContextManager["Libcryptsetup"]):
    """Loads states over one base, in a memfd.

    A keyslot is tried once with each secret for each of its kdf salts and each content of its area: what opens depends
    on nothing else.
    """

    def __init__(self, base: bytes, headers: int, secrets: Mapping[str, bytes]) -> None:
        self._base = base
        self._headers = headers
        self._secrets = {name: _safe(secret) for name, secret in secrets.items()}
        self._fd = os.memfd_create("crash-state")
        os.pwrite(self._fd, base, 0)
        self._there: dict[int, bytes] = {}
        self._owners: dict[str, str] = {}
        self._tried: dict[Hashable, str | None] = {}
        self._known: dict[Hashable, Loaded | EngineError] = {}
        self._pairs: dict[Hashable, Pair] = {}

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        for memory in self._secrets.values():
            memory.close()

    @property
    def loads(self) -> int:
        """How often libcryptsetup has loaded a header."""
        return len(self._known)

    def pair(self, image: Image) -> Pair:
        """Both copies, parsed once for equal headers; raises what ``read_pair`` raises."""
        key = image.changes_within(0, self._headers)
        if key not in self._pairs:
            self._pairs[key] = pair_of(image)
        return self._pairs[key]

    def alone(self, image: Image) -> dict[str, Image]:
        """Each valid copy alone: the other one is zeros."""
        count = self._headers // 2 // image.sector
        return {
            f"{copy.header.which} copy alone": image.with_sectors(
                {n + (count if copy.header.which is Which.PRIMARY else 0): bytes(image.sector) for n in range(count)}
            )
            for copy in self.pair(image).valid
        }

    def learn(self, images: Iterable[Image]) -> None:
        """Which secret belongs to which kdf salt; from states in which all keyslots are whole."""
        for image in images:
            self.load(image, thorough=True)

    def load(self, image: Image, *, thorough: bool = False) -> Loaded:
        """The state, recovered; raises ``EngineError`` if there is nothing to load.

        ``thorough`` tries all secrets on every keyslot, else only the one that its salt is known by, if it is.
        """
        if image.key in self._known and not thorough:
            found = self._known[image.key]
        else:
            found = self._known[image.key] = self._load(image, thorough=thorough)
        if isinstance(found, EngineError):
            raise found
        return found

    def _tool(self, fd: int) -> AbstractContextManager[Tool]:
        """Who loads the state that is in the memfd; raises ``EngineError``."""
        return Context(f"/proc/self/fd/{fd}")

    def _load(self, image: Image, *, thorough: bool) -> Loaded | EngineError:
        self._put(image)
        try:
            with self._tool(self._fd) as context:
                raw = context.metadata()
                recovered = self._recovered(image)
                slots = {int(number): slot for number, slot in raw["keyslots"].items()}
                found = {n: self._owner(context, recovered, n, slot, thorough=thorough) for n, slot in slots.items()}
                return Loaded(recovered, raw, found)
        except EngineError as error:
            return error

    def _owner(self, context: Tool, image: Image, number: int, slot: Raw, *, thorough: bool) -> str | None:
        """The name of the secret that opens a keyslot."""
        salt = slot.get("kdf", {}).get("salt")
        start = int(slot["area"]["offset"])
        end = start + min(int(slot["area"]["size"]), int(slot["key_size"]) * layout.STRIPES)
        names = [self._owners[salt]] if salt in self._owners and not thorough else list(self._secrets)
        key = (json.dumps(slot, sort_keys=True), image.changes_within(start, end), tuple(names))
        if key not in self._tried:
            opened = [name for name in names if context.opens(self._secrets[name], number)]
            self._tried[key] = opened[0] if opened else None
        owner = self._tried[key]
        if owner is not None:
            self._owners[salt] = owner
        return owner

    def _put(self, image: Image) -> None:
        """Make the memfd hold this state: the headers, and behind them what differs from the state before."""
        size = image.sector
        os.pwrite(self._fd, image.read(0, self._headers), 0)
        behind = {n * size: data for n, data in image.changes.items() if n * size >= self._headers}
        for offset in self._there.keys() - behind.keys():
            os.pwrite(self._fd, self._base[offset : offset + len(self._there[offset])], offset)
        for offset, data in behind.items():
            if self._there.get(offset) != data:
                os.pwrite(self._fd, data, offset)
        self._there = behind

    def _recovered(self, image: Image) -> Image:
        """The state with the headers that are in the memfd."""
        size = image.sector
        headers = os.pread(self._fd, self._headers, 0)
        rest = {n: data for n, data in image.changes.items() if n * size >= self._headers}
        if headers == image.read(0, self._headers):
            return image
        found = {n: headers[n * size : (n + 1) * size] for n in range(self._headers // size)}
        return Image(image.base, size, rest | found)


class Oracle:
    """Judges states of one operation: each must be what was there before it, or what is there after it."""

    def __init__(self, tool: Libcryptsetup, before: Image, after: Image) -> None:
        self.tool = tool
        tool.learn([before, after])
        self._ends = [before, after]
        self._meanings = {tool.load(alone).meaning for end in self._ends for alone in tool.alone(end).values()}
        self._meanings |= {tool.load(end).meaning for end in self._ends}

    def also(self, image: Image) -> None:
        """A further state that may be met: what reconcile makes of a volume that was in disorder."""
        self.tool.learn([image])
        self._meanings.add(self.tool.load(image).meaning)

    def judge(self, image: Image) -> list[str]:
        """What is wrong with the state: as it is, and by each of its valid copies alone."""
        try:
            masks = {"both copies": image, **self.tool.alone(image)}
        except LuksrotdError as error:
            return [f"lost: {error.message}"]
        return [f"{name}: {what}" for name, masked in masks.items() for what in self._judge(masked)]

    def _judge(self, image: Image) -> list[str]:
        try:
            loaded = self.tool.load(image)
        except EngineError as error:
            return [f"libcryptsetup cannot load it: {error.message}"]
        wrong = []
        winner, pair = self.tool.pair(image).winner, self.tool.pair(loaded.image)
        if loaded.raw != winner.metadata.raw or not healed(pair) or not winner.same_content(pair.winner):
            wrong.append("libcryptsetup chose another copy than we, or did not recover the bad one")
        if loaded.meaning not in self._meanings:
            wrong.append("neither what was before nor what is after")
        for number, token in loaded.raw["tokens"].items():
            dead = [slot for slot in token["keyslots"] if loaded.keyslots[int(slot)] is None]
            if token["type"] == TOKEN_TYPE and dead:
                wrong.append(f"token {number} names keyslot {dead[0]}, which nothing opens")
        if "main" not in loaded.keyslots.values():
            wrong.append("the main passphrase does not open")
        return wrong


def healed(pair: Pair) -> bool:
    """Whether libcryptsetup has done its recovery; equal sequence numbers hide a difference from it."""
    return pair.agree or (len(pair.valid) == len(Which) and pair.valid[0].header.seqid == pair.valid[1].header.seqid)


def _safe(secret: bytes) -> SafeMemory:
    memory = SafeMemory(len(secret))
    memory.view()[:] = secret
    return memory
