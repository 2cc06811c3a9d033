# SPDX-License-Identifier: GPL-2.0-or-later
"""Signatures on a device, found by wipefs(8).

libcryptsetup refuses to recover a header from its second copy when libblkid finds anything else on the device
("ambiguous signatures").  wipefs asks the same library, but lists every signature, not only the winning one, and
knows both LUKS2 copies by their own magic.
"""

import asyncio
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Final

from luksrotd.errors import DeviceError
from luksrotd.host.blockdev import identity_of
from luksrotd.ports import HeaderDevice

PROBE_TIMEOUT: Final = 20.0
"""Seconds; a healthy device takes milliseconds."""
SHARED_TIMEOUT: Final = 2.0
"""Seconds for a look at several devices, which no dead one shall hold up for long."""

_OUR_TYPE: Final = "crypto_LUKS"
_OUTPUT_LIMIT: Final = 256 * 1024
_ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


class WipefsProbe:
    """``ports.SignatureProbe`` by ``wipefs --no-act --json``; ``timeout`` in seconds."""

    def __init__(self, *, command: str = "wipefs", timeout: float = PROBE_TIMEOUT) -> None:
        self._command = command
        self._timeout = timeout

    async def foreign(self, device: HeaderDevice) -> Sequence[str]:
        """Types of the signatures that are not LUKS's, in the order of their place; ``DeviceError`` if it fails."""
        (fd,) = await _opened_same([device])
        try:
            output = await self._run(device.path, [fd], self._timeout)
        finally:
            os.close(fd)
        return _foreign_types(device.path, output)

    async def all_clear(self, devices: Sequence[HeaderDevice]) -> bool:
        """See ``ports.SignatureProbe``: to start wipefs takes twenty times as long as to look at a device."""
        where = f"{len(devices)} devices"
        fds: Sequence[int] = ()
        try:
            async with asyncio.timeout(min(self._timeout, SHARED_TIMEOUT)):
                fds = await _opened_same(devices)
                return not _foreign_types(where, await self._run(where, fds, self._timeout))
        except (DeviceError, TimeoutError):
            return False
        finally:
            for fd in fds:
                os.close(fd)

    async def _run(self, where: str, fds: Sequence[int], seconds: float) -> bytes:
        try:
            process = await asyncio.create_subprocess_exec(
                self._command,
                "--no-act",
                "--json",
                *(f"/proc/self/fd/{fd}" for fd in fds),
                pass_fds=fds,
                env=_ENVIRONMENT,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise DeviceError(f"cannot probe {where}: cannot run {self._command}: {error.strerror}") from error
        try:
            async with asyncio.timeout(seconds):
                output, complaint = await asyncio.gather(
                    _bounded(process, process.stdout), _bounded(process, process.stderr)
                )
                status = await process.wait()
        except TimeoutError as error:
            raise DeviceError(f"cannot probe {where}: {self._command} does not end") from error
        finally:
            await _end(process)
        if max(len(output), len(complaint)) > _OUTPUT_LIMIT:
            raise DeviceError(f"cannot probe {where}: {self._command} says too much")
        if status:
            reason = _last_line(complaint) or f"{self._command} ended with {status}"
            raise DeviceError(f"cannot probe {where}: {reason}")
        return output


async def _opened_same(devices: Sequence[HeaderDevice]) -> Sequence[int]:
    """``_open_all`` in a thread, for a device may be dead; descriptors that come too late are closed."""
    opening = asyncio.ensure_future(asyncio.to_thread(_open_all, devices))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close)
        raise


def _close(opening: "asyncio.Future[Sequence[int]]") -> None:
    if opening.exception() is None:
        for fd in opening.result():
            os.close(fd)


def _open_all(devices: Sequence[HeaderDevice]) -> Sequence[int]:
    with ExitStack() as opened:
        fds = []
        for device in devices:
            fds.append(_open_same(device))
            opened.callback(os.close, fds[-1])
        opened.pop_all()
        return fds


def _open_same(device: HeaderDevice) -> int:
    """The device under a descriptor of its own: its name may mean something else by now, to wipefs too."""
    try:
        fd = os.open(device.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DeviceError(f"cannot probe {device.path}: {error.strerror}") from error
    if identity_of(os.fstat(fd)) != device.identity:
        os.close(fd)
        raise DeviceError(f"cannot probe {device.path}: it was replaced")
    return fd


async def _bounded(process: asyncio.subprocess.Process, stream: asyncio.StreamReader | None) -> bytes:
    """All that comes, but not much more than the limit: there the process is killed, and the rest dropped."""
    data = bytearray()
    while stream is not None and (part := await stream.read(65536)):
        if len(data) > _OUTPUT_LIMIT:
            continue
        data += part
        if len(data) > _OUTPUT_LIMIT:
            _kill(process)
    return bytes(data)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill it if it still runs, and read its pipes to their end: asyncio closes them only then."""
    _kill(process)
    # A process that waits for a dead disk dies when the disk answers; asyncio's watcher reaps it then.
    with suppress(TimeoutError):
        async with asyncio.timeout(1):
            await process.communicate()


def _kill(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()


def _foreign_types(path: str, output: bytes) -> tuple[str, ...]:
    if not output.strip():  # some versions say nothing when they find nothing
        return ()
    try:
        types = [str(signature["type"]) for signature in json.loads(output)["signatures"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DeviceError(f"cannot probe {path}: wipefs says what is not understood") from error
    return tuple(dict.fromkeys(kind for kind in types if kind != _OUR_TYPE))


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
