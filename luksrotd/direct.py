# SPDX-License-Identifier: GPL-2.0-or-later
"""The use cases on the real ports, without a bus: for ``luksrotctl --direct``; the daemon builds its host here too.

What only few verbs need is imported by the functions that they call: a process that rotates one key has no use for it.
"""

import asyncio
import errno
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from luksrotd.errors import (
    DeviceError,
    FormatError,
    InvalidRequest,
    LuksrotdError,
    NotAuthorized,
    NotLuks2,
    UnknownDevice,
)
from luksrotd.host.blockdev import BlockDevices
from luksrotd.host.clock import SystemClock
from luksrotd.host.entropy import KernelEntropy
from luksrotd.host.inventory import FileInventories
from luksrotd.host.journal import JOURNAL_SOCKET, SystemdJournal
from luksrotd.host.launch import Launched
from luksrotd.host.locks import HostLocks
from luksrotd.host.probe import WipefsProbe
from luksrotd.host.process import myself
from luksrotd.host.shadow import MemfdShadows
from luksrotd.host.spare import OnlyOne
from luksrotd.host.worker import WorkerEngine
from luksrotd.luks2.pair import read_pair
from luksrotd.names import ATOMIC, STEPWISE
from luksrotd.ports import DeviceLocks, DeviceRef, Host, Journal, KeyslotEngine, Query
from luksrotd.service.threads import in_thread
from luksrotd.service.volume import Hold, Volumes

if TYPE_CHECKING:
    from luksrotd.service.headers import Headers
    from luksrotd.service.planning import Planned
    from luksrotd.service.sets import VolumeSets
    from luksrotd.service.setwork import SetRequest

#: What its callers need of the use cases themselves.
__all__ = ["Hold"]

#: Who acts by ``volumes``, ``sets`` and ``headers``.
CLIENT: Final = "luksrotctl"
BY_UUID: Final = Path("/dev/disk/by-uuid")
BLOCK_DEVICES: Final = Path("/sys/class/block")

#: Hands over a worker that was launched already, once; then ``None``.
Ahead = Callable[[], Launched | None]

#: How long a device may take to say what it holds, where others wait for it.
SCAN_SECONDS: Final = 20.0
#: A drive without a medium, a node without a driver: nothing to be told about.
_ABSENT: Final = frozenset({errno.ENOMEDIUM, errno.ENXIO, errno.ENODEV, errno.ENOENT})


class NoJournal:
    """``ports.Journal`` for a caller that tells its user itself, where no journal is listening."""

    def record(self, message: str, **fields: str | int) -> None:
        """Nothing."""


def build_host(
    *, journal: Journal | None = None, locks: DeviceLocks | None = None, engine: KeyslotEngine | None = None
) -> Host:
    """The ports of this machine; a daemon brings its own journal, its waiting times and its admission of workers."""
    return Host(
        devices=BlockDevices(),
        locks=locks or HostLocks(),
        shadows=MemfdShadows(),
        engine=engine or WorkerEngine(),
        probe=WipefsProbe(),
        entropy=KernelEntropy(),
        clock=SystemClock(),
        journal=journal or SystemdJournal(),
        inventories=FileInventories(),
        myself=replace(myself("luksrotd"), uid=os.geteuid()),
    )


def caller_host(client: str = "", ahead: Ahead | None = None) -> Host:
    """The ports for a caller that tells its user itself: recorded in the journal if there is one, never on stderr.

    ``client``: the name of the program in the record, else what the kernel calls the process.  ``ahead``: hands over
    a worker that was launched already, if there is one.
    """
    journal = SystemdJournal() if Path(JOURNAL_SOCKET).exists() else NoJournal()
    host = build_host(journal=journal, engine=WorkerEngine(spare=OnlyOne(ahead) if ahead else None))
    return replace(host, myself=myself(client))


def volumes(engine: str = ATOMIC, ahead: Ahead | None = None) -> Volumes:
    """The use cases for one caller at a terminal; ``engine``: who writes the header, ``names.ENGINES``."""
    host = caller_host(CLIENT, ahead)
    if engine != STEPWISE:
        return Volumes(host)
    from luksrotd.host.live import LiveWorkerEngine  # noqa: PLC0415 - see above
    from luksrotd.service.stepwise import StepwiseVolumes  # noqa: PLC0415 - see above

    return StepwiseVolumes(host, LiveWorkerEngine())


def sets(ahead: Ahead | None = None) -> "VolumeSets":
    """The use cases on sets of volumes, for the same."""
    from luksrotd.service.sets import VolumeSets  # noqa: PLC0415 - see above

    return VolumeSets(caller_host(CLIENT, ahead))


def set_request(*members: Any) -> "SetRequest":
    """What is to become of a set: the members of ``SetRequest``."""
    from luksrotd.service.setwork import SetRequest  # noqa: PLC0415 - see above

    return SetRequest(*members)


async def plan(volumes: Volumes, ref: DeviceRef, verb: str, name: str) -> "Planned":
    """What a verb would do (``service.planning``); raises what it would raise before it needs a secret."""
    from luksrotd.service import planning  # noqa: PLC0415 - see above
    from luksrotd.service.jobs import Kind  # noqa: PLC0415 - see above
    from luksrotd.service.verbs import Wanted  # noqa: PLC0415 - see above

    kind, wanted = Kind(verb), Wanted(name)
    seen, change = await volumes.plan(ref, lambda view, now: planning.decide(kind, wanted, view, now))
    return planning.of_change(kind, wanted, seen, change)


async def history(uuid: str, since: int, limit: int) -> Sequence[Mapping[str, str]]:
    """The newest records of what was done (``ports.Query``), of all volumes where ``uuid`` is ''."""
    from luksrotd.host.history import JournalHistory  # noqa: PLC0415 - see above
    from luksrotd.service.history import Chronicle  # noqa: PLC0415 - see above

    return await Chronicle(JournalHistory()).read(Query(uuid, since, None, limit))


def headers() -> "Headers":
    """Header backup and restore, for the same."""
    from luksrotd.host.backupfile import BackupFiles  # noqa: PLC0415 - see above
    from luksrotd.service.headers import Headers  # noqa: PLC0415 - see above

    return Headers(caller_host(CLIENT), BackupFiles())


def device_ref(path: str, header: str | None = None) -> DeviceRef:
    """A volume by the path of its block device or image, and of its detached header.

    Where the header is detached nothing is ever read from ``path``, so a mistaken one would go unnoticed: raises
    ``UnknownDevice`` and ``DeviceError``.
    """
    if header is not None:
        try:
            Path(path).stat()
        except OSError as error:
            kind = UnknownDevice if isinstance(error, FileNotFoundError) else DeviceError
            raise kind(f"cannot open {path}: {error.strerror}") from error
    return DeviceRef(path, header)


def node_of(uuid: str) -> str:
    """The block device that holds the volume ``uuid``; raises ``UnknownDevice``, or ``InvalidRequest`` for several.

    udev's link comes first; where udev does not run (an initramfs, a container), or has not seen the device, all are
    looked through.
    """
    link = BY_UUID / uuid.lower()
    if link.exists():
        return str(link.resolve())
    found, failed = [], ""
    for node in scan():
        try:
            if uuid_of(DeviceRef(node)) == uuid.lower():
                found.append(node)
        except LuksrotdError as error:  # it may be another one that is meant
            failed = f"; {error.message}"
    if not found:
        raise UnknownDevice(f"cannot find a block device with the LUKS UUID {uuid}{failed}")
    if len(found) > 1:
        raise InvalidRequest(f"cannot choose between {', '.join(found)}: all have the LUKS UUID {uuid}")
    return found[0]


def scan() -> tuple[str, ...]:
    """The nodes of all block devices with a LUKS2 header, a damaged one too.

    Those that root may not open are among them unless udev says that they hold something else: to use one will fail and
    say why.  Raises ``NotAuthorized`` where others than root cannot read block devices.
    """
    return _readable({node: _look(node) for node in _nodes()})


async def scan_in_time(seconds: float = SCAN_SECONDS) -> tuple[str, ...]:
    """The same, side by side; last come those that have not answered after ``seconds``, whatever they may hold."""
    looks = {node: asyncio.ensure_future(in_thread(partial(_look, node), about=node)) for node in _nodes()}
    if looks:
        await asyncio.wait(looks.values(), timeout=seconds)
    answered = {node: look.result() for node, look in looks.items() if look.done()}
    return _readable(answered | {node: True for node in looks if node not in answered})


class Turns:
    """One after the other for nodes that show one LUKS UUID, where all else is done side by side.

    They may be one and the same storage (paths to one disk, a mirror and its members), and locks go by the node.
    """

    def __init__(self) -> None:
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @asynccontextmanager
    async def of(self, ref: DeviceRef) -> AsyncIterator[None]:
        """This one's turn; at once for what has no LUKS2 header that could be read, and so is not written either."""
        try:
            uuid = await in_thread(partial(uuid_of, ref), about=ref.metadata_path)
        except LuksrotdError:
            uuid = None
        async with self._turns[uuid] if uuid else nullcontext():
            yield


def _look(node: str) -> bool | None:
    """Whether it holds LUKS2; ``None`` where its owner and mode do not let us see.

    What a control group keeps from us (EPERM) is meant for others than this container, and holds nothing.
    """
    try:
        return _holds_luks2(node)
    except PermissionError as error:
        return None if error.errno == errno.EACCES else False


def _readable(found: Mapping[str, bool | None]) -> tuple[str, ...]:
    forbidden = [node for node, holds in found.items() if holds is None]
    if not forbidden:
        return tuple(node for node, holds in found.items() if holds)
    if os.geteuid() != 0:
        raise NotAuthorized(f"cannot read {len(forbidden)} block devices: {os.strerror(errno.EACCES)}; try as root")
    from luksrotd.host.udev import may_hold_luks  # noqa: PLC0415 - see above

    return tuple(node for node, holds in found.items() if holds or (holds is None and may_hold_luks(node)))


def uuid_of(ref: DeviceRef) -> str | None:
    """The LUKS UUID, ``None`` for what is no LUKS2; blocks, raises ``FormatError`` and ``DeviceError``."""
    try:
        device = BlockDevices().open(ref)
        try:
            return read_pair(device.read, device.size).winner.header.uuid
        finally:
            device.close()
    except (UnknownDevice, NotLuks2):
        return None
    except DeviceError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _ABSENT:
            return None
        raise


def _nodes() -> Iterable[str]:
    """In the kernel's order of names, numbers by value; without those that are a part of another one."""
    try:
        entries = sorted(BLOCK_DEVICES.iterdir(), key=lambda entry: (len(entry.name), entry.name))
    except OSError as error:
        raise DeviceError(f"cannot list the block devices: {error.strerror}") from error
    for entry in entries:
        try:
            fields = dict(line.split("=", 1) for line in (entry / "uevent").read_text().splitlines() if "=" in line)
            empty = int((entry / "size").read_text()) == 0
            part = _is_part(entry.resolve())
        except (OSError, ValueError):  # it has gone meanwhile
            continue
        if "DEVNAME" in fields and not (empty or part):
            yield f"/dev/{fields['DEVNAME']}"


def _is_part(device: Path) -> bool:
    """Whether a device that may show the same header stands on it, or on its disk: a multipath map, a mirror, a volume.

    The one on top is to be written: it would not notice what is written beneath it.
    """
    places = [device, device.parent] if (device / "partition").exists() else [device]
    return any(not _is_crypt(holder) for place in places for holder in (place / "holders").glob("*"))


def _is_crypt(device: Path) -> bool:
    """Whether it is dm-crypt's or its kin's, which show something else than the device beneath."""
    try:
        return (device / "dm" / "uuid").read_text().startswith("CRYPT-")
    except FileNotFoundError:
        return False


def _holds_luks2(node: str) -> bool:
    """Raises ``PermissionError``; a device that fails holds nothing."""
    try:
        return uuid_of(DeviceRef(node)) is not None
    except FormatError:
        return True
    except LuksrotdError as error:
        if isinstance(error.__cause__, PermissionError):
            raise error.__cause__ from None
        return False
