# SPDX-License-Identifier: GPL-2.0-or-later
"""What any command writes to an image or block device, and where it flushes: seen by strace(1).

For ``tests/support/crash.Enumeration``: the crash states of programs that do not run on a simulated disk (cryptsetup,
systemd-cryptenroll, libcryptsetup in our worker).  Whatever is recorded is replayed on the bytes before and compared
with those after, so that nothing can be missed unnoticed.

Only fsync(2) and fdatasync(2) that succeed, and writes through O_SYNC or O_DSYNC, count as flushes; sync(2), closing,
O_DIRECT do not.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.simdisk import Write

#: Every call that opens, duplicates, moves or writes through a descriptor, or makes a process.
CALLS: Final = (
    "open,openat,openat2,creat,dup,dup2,dup3,fcntl,clone,clone3,fork,vfork,close,lseek,read,readv,write,writev,"
    "pwrite64,pwritev,pwritev2,fsync,fdatasync,ftruncate,fallocate,ioctl,mmap,sendfile,copy_file_range,splice,"
    "io_uring_setup,io_submit"
)
#: Bytes of a string that strace prints: more than anybody writes in one call.
LONGEST: Final = 64 * 1024 * 1024

_CALL = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+|\?|0x[0-9a-f]+)(.*)", re.DOTALL)
_UNFINISHED = re.compile(r"(\d+) +(\w+)\((.*) <unfinished \.\.\.>", re.DOTALL)
_RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)", re.DOTALL)
_FD = re.compile(r"(\d+)(?:<((?:\\x[0-9a-f]{2})*)>(?:\(deleted\))?)?")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')


@dataclass(slots=True)
class Recording:
    """One run: how it ended, the device before and after it, and what it wrote.

    ``epochs``: the writes, cut at the flushes, as ``SimDisk.epochs``; the last epoch, maybe empty, was not flushed.
    """

    status: int
    stdout: bytes
    stderr: bytes
    before: bytes
    after: bytes
    epochs: list[list[Write]]

    @property
    def writes(self) -> list[Write]:
        """All writes in their order."""
        return [write for epoch in self.epochs for write in epoch]


def record(
    command: Sequence[str], image: Path, *, stdin: bytes = b"", environment: Mapping[str, str] | None = None
) -> Recording:
    """Run ``command`` and record what it, and all that it starts, does to ``image`` (an image or block device).

    ``environment`` comes on top of ours.  Raises ``AssertionError`` if what was seen does not explain what became of
    the image.
    """
    before = image.read_bytes()
    with tempfile.TemporaryDirectory(prefix="luksrotd-strace-") as directory:
        log = Path(directory) / "log"
        trace = ["strace", "-f", "-y", "-xx", "-s", str(LONGEST), "-e", f"trace={CALLS}", "-e", "signal=none"]
        done = subprocess.run(
            [*trace, "-o", str(log), "--", *command],
            input=stdin,
            capture_output=True,
            check=False,
            env={**os.environ, **(environment or {})},
        )
        tracer = Tracer(image.resolve())
        with log.open() as lines:
            for line in lines:
                tracer.take(line.rstrip("\n"))
    after = image.read_bytes()
    recording = Recording(done.returncode, done.stdout, done.stderr, before, after, tracer.epochs)
    assert replay(before, recording.writes) == after, f"what {command[0]} wrote was not all seen"
    return recording


def replay(base: bytes, writes: Sequence[Write]) -> bytes:
    """``base`` after all ``writes``."""
    content = bytearray(base)
    for write in writes:
        content[write.offset : write.end] = write.data
    return bytes(content)


@dataclass(slots=True)
class Description:
    """An open file description of the image: shared by duplicates and children."""

    offset: int | None = None
    synchronous: bool = False

    def advance(self, length: int) -> int:
        """Where ``length`` bytes begin that are read or written now."""
        assert self.offset is not None, "a descriptor of unknown offset was used"
        start, self.offset = self.offset, self.offset + length
        return start


class Tracer:
    """Reads the lines of strace and keeps each process's table of descriptors of the image ``path``."""

    def __init__(self, path: Path) -> None:
        self.epochs: list[list[Write]] = [[]]
        self._path = os.fsencode(path)
        self._tables: dict[int, dict[int, Description]] = {}
        self._unfinished: dict[int, tuple[str, str]] = {}

    def take(self, line: str) -> None:
        """One line of the log; a call that another one interrupts takes two."""
        if match := _UNFINISHED.fullmatch(line):
            self._unfinished[int(match[1])] = (match[2], match[3])
            return
        if match := _RESUMED.fullmatch(line):
            name, begun = self._unfinished.pop(int(match[1]))
            line = f"{match[1]} {name}({begun}{match[3]}"
        if match := _CALL.fullmatch(line):
            if match[4] == "?" or match[4].startswith("-"):
                return
            self._call(int(match[1]), match[2], match[3], int(match[4], 0), match[5])

    def _call(self, pid: int, name: str, arguments: str, result: int, rest: str) -> None:
        if name in ("clone", "clone3", "fork", "vfork"):
            self._spawned(pid, result, shared="CLONE_FILES" in arguments)
        elif name in ("open", "openat", "openat2", "creat"):
            self._opened(pid, arguments, result, rest)
        elif (match := _FD.match(arguments)) and self._is_image(match[2]):
            self._used(pid, name, int(match[1]), arguments, result)
        elif name in ("dup2", "dup3"):
            self._table(pid).pop(result, None)
        elif name in ("sendfile", "copy_file_range", "splice", "mmap"):
            image = "".join(f"\\x{byte:02x}" for byte in self._path)
            harmless = name == "mmap" and ("MAP_SHARED" not in arguments or "PROT_WRITE" not in arguments)
            assert harmless or f"<{image}>" not in arguments, f"cannot follow {name} on the image"

    def _used(self, pid: int, name: str, fd: int, arguments: str, result: int) -> None:
        table = self._table(pid)
        description = table.setdefault(fd, Description())
        if name in ("dup", "dup2", "dup3") or (name == "fcntl" and "F_DUPFD" in arguments):
            table[result] = description
        elif name == "close":
            del table[fd]
        elif name == "lseek":
            description.offset = result
        elif name in ("read", "readv"):
            description.advance(result)
        elif name in ("write", "writev"):
            self._wrote(description.advance(result), arguments, result, flushed=description.synchronous)
        elif name in ("pwrite64", "pwritev", "pwritev2"):
            assert "RWF_APPEND" not in arguments
            end = arguments.rfind("]") if name != "pwrite64" else arguments.rfind('"')
            numbers = [int(number) for number in re.findall(r", (\d+)", arguments[end:])]
            self._wrote(numbers[1], arguments, result, flushed=description.synchronous or "SYNC" in arguments[end:])
        elif name in ("fsync", "fdatasync"):
            self.epochs.append([])
        else:
            harmless = name in ("fcntl", "ioctl") and not re.search("BLKZEROOUT|DISCARD|FICLONE", arguments)
            harmless |= name == "mmap" and ("MAP_SHARED" not in arguments or "PROT_WRITE" not in arguments)
            assert harmless, f"cannot follow {name} on the image"

    def _wrote(self, offset: int, arguments: str, length: int, *, flushed: bool) -> None:
        # The first string of a line may be preceded by paths, which stand in <>, never in quotation marks.
        parts = list(_STRING.finditer(arguments))
        assert parts, "a write without data"
        assert not any(part[2] for part in parts), "a write longer than strace prints"
        data = b"".join(_bytes(part[1]) for part in parts)[:length]
        assert len(data) == length
        if data:
            self.epochs[-1].append(Write(offset, data))
        if flushed:
            self.epochs.append([])

    def _opened(self, pid: int, arguments: str, fd: int, rest: str) -> None:
        self._table(pid).pop(fd, None)
        match = _FD.match(f"{fd}{rest}")
        if match and self._is_image(match[2]):
            assert not re.search("O_TRUNC|O_APPEND", arguments), "the image is truncated or appended to"
            self._table(pid)[fd] = Description(0, bool(re.search(r"O_D?SYNC", arguments)))

    def _spawned(self, parent: int, child: int, *, shared: bool) -> None:
        table = self._table(parent)
        early = self._table(child)  # what the child did before its parent's call returned
        if shared:
            table |= early
        self._tables[child] = table if shared else table | early

    def _table(self, pid: int) -> dict[int, Description]:
        return self._tables.setdefault(pid, {})

    def _is_image(self, path: str | None) -> bool:
        return path is not None and _bytes(path) == self._path


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))
