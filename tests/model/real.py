# SPDX-License-Identifier: GPL-2.0-or-later
"""The same machine with real libcryptsetup: real headers, real workers, the real cryptsetup command as the stranger.

Only the disk below is simulated, so that its power can be cut.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from luksrotd.cryptsetup.api import Context
from luksrotd.cryptsetup.memory import SafeMemory
from luksrotd.host.shadow import MemfdShadows
from luksrotd.host.worker import WorkerEngine
from luksrotd.luks2.layout import Which
from luksrotd.luks2.pair import HeaderCopy
from luksrotd.rotation.edits import AddKeyslot, DestroyKeyslot, Edit, RemoveToken, SetToken
from luksrotd.rotation.view import view
from luksrotd.service.volume import Volumes
from tests.model.machine import Volume
from tests.support import makeimage
from tests.support.simulation import Simulation

MIB = 1024 * 1024


class RealVolume(Volume):
    """One real volume."""

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory(prefix="luksrotd-model-")
        self._known: dict[tuple[str, bytes], str] = {}

    def teardown(self) -> None:
        """Called by hypothesis at the end of a sequence."""
        self._directory.cleanup()

    def host(self, content: bytes) -> Simulation:
        """With a real worker."""
        simulation = super().host(content)
        simulation.host = replace(simulation.host, shadows=MemfdShadows(), engine=WorkerEngine())
        simulation.volumes = Volumes(simulation.host)
        return simulation

    def format(self) -> bytes:
        """By cryptsetup luksFormat."""
        path = self._path("new")
        makeimage.make_image(path, key=self.secret("main"), keyslots_size=2 * MIB, size=4 * MIB, key_size=256)
        return path.read_bytes()

    def openers(self, content: bytes) -> Callable[[HeaderCopy], dict[int, str]]:
        """What libcryptsetup opens with that copy alone."""

        def found(copy: HeaderCopy) -> dict[int, str]:
            opened, unknown = {}, []
            for slot in copy.metadata.keyslots.values():
                there = hashlib.sha256(content[slot.area.offset : slot.area.end]).digest()
                identity = (slot.kdf_salt or "", there)
                if identity not in self._known:
                    unknown.append((slot.id, identity))
                opened[slot.id] = self._known.get(identity, "")
            if unknown:
                for number, identity in unknown:
                    opened[number] = self._try(content, copy, number)
                    if opened[number]:
                        self._known[identity] = opened[number]
            return {number: name for number, name in opened.items() if name}

        return found

    def stranger(self, *edits: Edit, new: bytes = b"") -> None:
        """The cryptsetup command."""
        for edit in edits:
            match edit:
                case AddKeyslot(keyslot):
                    self.cryptsetup("luksAddKey", "--key-slot", str(keyslot), *makeimage.PBKDF, new=new)
                case DestroyKeyslot(keyslot):
                    self.cryptsetup("luksKillSlot", behind=(str(keyslot),))
                case SetToken(token, body):
                    path = self._written()
                    makeimage.import_token(path, body, token)
                    self.simulation.disk.replace(0, path.read_bytes())
                case RemoveToken(token):
                    self.cryptsetup("token", "remove", "--token-id", str(token))

    @precondition(lambda self: self.settled)
    @rule(number=st.integers(0, 9))
    def stranger_changes_a_key(self, number: int) -> None:
        """``cryptsetup luksChangeKey``, of an ordinary keyslot."""
        opened = self._openers()
        slots = [slot for slot in sorted(view(self._seen()[0]).ordinary) if opened[slot] != "main"]
        if not slots:
            return
        old, ref = opened[slots[number % len(slots)]], self._new()
        self.cryptsetup("luksChangeKey", *makeimage.PBKDF, key=self.secrets[old], new=self.secrets[ref])
        self._foreign_change(lambda world: world.opens.symmetric_difference_update({old, ref}))

    @precondition(lambda self: self.settled)
    @rule()
    def stranger_sets_the_label(self) -> None:
        """``cryptsetup config --label``."""
        label = f"label {self.steps}"
        self.cryptsetup("config", "--label", label)
        self._foreign_change(lambda world: setattr(world, "label", label))

    @precondition(lambda self: self.settled)
    @rule(priority=st.sampled_from(["prefer", "normal"]))
    def stranger_sets_a_priority(self, priority: str) -> None:
        """``cryptsetup config --priority``."""
        self.cryptsetup("config", "--key-slot", "0", "--priority", priority)
        self._foreign_change(lambda world: None)

    def cryptsetup(self, *arguments: str, key: bytes = b"", new: bytes = b"", behind: tuple[str, ...] = ()) -> None:
        """Run it on a file with the volume in it, and take over what it has made of it."""
        path, keys = self._written(), self._path("key")
        keys.write_bytes(key or self.secrets["main"])
        if new:
            self._path("new-key").write_bytes(new)
            behind = (*behind, str(self._path("new-key")))
        given = ("--key-file", str(keys)) if arguments[0].startswith("luks") else ()
        makeimage.run(*arguments, *given, str(path), *behind)
        self.simulation.disk.replace(0, path.read_bytes())

    def _try(self, content: bytes, copy: HeaderCopy, keyslot: int) -> str:
        size = len(copy.raw)
        other = 0 if copy.header.which is Which.SECONDARY else size
        image = os.memfd_create("one-copy", os.MFD_CLOEXEC)
        try:
            os.pwrite(image, content[:other] + bytes(size) + content[other + size :], 0)
            with Context(f"/proc/self/fd/{image}") as context:
                for name, secret in reversed(self.secrets.items()):
                    memory = SafeMemory(len(secret))
                    memory.view()[:] = secret
                    with memory:
                        if context.opens(memory, keyslot):
                            return name
        finally:
            os.close(image)
        return ""

    def _written(self) -> Path:
        path = self._path("volume")
        path.write_bytes(self.simulation.disk.content)
        return path

    def _path(self, name: str) -> Path:
        return Path(self._directory.name, name)
