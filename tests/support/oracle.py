# SPDX-License-Identifier: GPL-2.0-or-later
"""What real libcryptsetup makes of a crash state: of the whole, and of each valid copy alone."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from luksrotd.cryptsetup.api import Context
from luksrotd.cryptsetup.memory import SafeMemory
from luksrotd.errors import EngineError, WrongCredential
from luksrotd.luks2.layout import Which
from luksrotd.luks2.pair import Pair, parse_pair, read_pair
from luksrotd.rotation.view import view
from tests.support.crash import Crash, Enumeration, Image


@dataclass(slots=True)
class Oracle:
    """``keep`` must always open; ``generations`` are the secrets of the key named "backup", by generation."""

    keep: Mapping[str, bytes]
    generations: Mapping[int, bytes]
    may_be_absent: bool = False
    judged: dict[bytes, list[str]] = field(default_factory=dict)
    opened: int = 0
    """How often libcryptsetup has loaded a header."""

    def judge(self, image: "MemoryImage") -> list[str]:
        """What is wrong with the image as it is."""
        headers = image.headers
        pair = read_pair(image.read, image.size)
        masks = {"both": headers}
        for copy in pair.valid:
            other = copy.header.which.other
            start = 0 if other is Which.PRIMARY else pair.hdr_size
            masks[f"{copy.header.which} alone"] = (
                headers[:start] + bytes(pair.hdr_size) + headers[start + pair.hdr_size :]
            )
        wrong: list[str] = []
        for name, masked in masks.items():
            key = hashlib.blake2b(masked + image.areas_digest(pair)).digest()
            if key not in self.judged:
                with image.with_headers(masked):
                    self.judged[key] = self._open(image)
            wrong += [f"{name}: {what}" for what in self.judged[key]]
        return wrong

    def _open(self, image: "MemoryImage") -> list[str]:
        self.opened += 1
        try:
            with Context(image.path) as context:
                return self._judge_context(context, image)
        except EngineError as error:
            return [f"libcryptsetup cannot load it: {error.message}"]

    def _judge_context(self, context: Context, image: "MemoryImage") -> list[str]:
        wrong = [f"{name} does not open" for name, secret in self.keep.items() if not opens_any(context, secret)]
        recovered = parse_pair(image.read(0, image.size))
        if context.metadata() != recovered.winner.metadata.raw or not recovered.agree:
            wrong.append("libcryptsetup chose another copy than we, or did not recover the bad one")
        keys = view(recovered).keys
        if not keys and self.may_be_absent:
            return wrong
        if len(keys) != 1 or keys[0].keyslot is None:
            return [*wrong, f"{len(keys)} tokens of ours"]
        secret = self.generations[keys[0].token.generation]
        if not opens_keyslot(context, secret, keys[0].keyslot.id):
            wrong.append(f"generation {keys[0].token.generation} does not open keyslot {keys[0].keyslot.id}")
        for number, other in self.generations.items():
            if number != keys[0].token.generation and opens_any(context, other):
                wrong.append(f"generation {number} opens too: two live pairs")
        return wrong


class MemoryImage:
    """A device image in a memfd, which libcryptsetup may open and repair."""

    def __init__(self, content: bytes | Image, header_size: int) -> None:
        self.fd = os.memfd_create("crash-state")
        self.size = len(content)
        self._headers_size = header_size
        os.pwrite(self.fd, bytes(content), 0)

    @property
    def path(self) -> str:
        """For libcryptsetup."""
        return f"/proc/self/fd/{self.fd}"

    @property
    def headers(self) -> bytes:
        """Both copies."""
        return self.read(0, self._headers_size)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the image."""
        return os.pread(self.fd, length, offset)

    def write(self, offset: int, data: bytes) -> None:
        """Change it."""
        os.pwrite(self.fd, data, offset)

    def areas_digest(self, pair: Pair) -> bytes:
        """Of everything that a keyslot of either copy references."""
        digest = hashlib.blake2b()
        for area in pair.referenced:
            digest.update(self.read(area.offset, area.size))
        return digest.digest()

    @contextmanager
    def with_headers(self, headers: bytes) -> Iterator[None]:
        """The image with these header bytes; what libcryptsetup repairs is taken back."""
        before = self.headers
        self.write(0, headers)
        try:
            yield
        finally:
            self.write(0, before)

    @contextmanager
    def crashed(self, crash: Crash, sector: int) -> Iterator[None]:
        """The image with the sectors of a crash state."""
        before = {number: self.read(number * sector, sector) for number in crash.sectors}
        for number, data in crash.sectors.items():
            self.write(number * sector, data)
        try:
            yield
        finally:
            for number, data in before.items():
                self.write(number * sector, data)

    def close(self) -> None:
        """Give the memory back."""
        os.close(self.fd)


def states(enumeration: Enumeration) -> Iterator[tuple[Crash, MemoryImage]]:
    """Every crash state, one after the other, in one image per epoch."""
    for epoch, start in enumerate(enumeration.starts[:-1]):
        image = MemoryImage(start, enumeration.headers)
        try:
            for crash in enumeration.crashes([epoch]):
                with image.crashed(crash, enumeration.sector):
                    yield crash, image
        finally:
            image.close()


def same_content(image: MemoryImage, others: list[Pair]) -> bool:
    """Whether the header says exactly what one of ``others`` says."""
    winner = parse_pair(image.read(0, image.size)).winner
    return any(winner.same_content(pair.winner) for pair in others)


def opens_keyslot(context: Context, secret: bytes, keyslot: int) -> bool:
    """Whether ``secret`` opens that keyslot."""
    with _memory(secret) as memory:
        return context.opens(memory, keyslot)


def opens_any(context: Context, secret: bytes) -> bool:
    """Whether ``secret`` opens the volume by any keyslot."""
    with _memory(secret) as memory:
        try:
            _, key = context.volume_key(memory)
        except WrongCredential:
            return False
        key.close()
        return True


def _memory(secret: bytes) -> SafeMemory:
    memory = SafeMemory(len(secret))
    memory.view()[:] = secret
    return memory
