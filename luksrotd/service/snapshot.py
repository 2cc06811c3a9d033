# SPDX-License-Identifier: GPL-2.0-or-later
"""What a transaction starts from: both header copies, and the keyslot areas that it needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from luksrotd.errors import FormatError, InvalidRequest, UnknownDevice
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.pair import Pair, is_lost, read_pair
from luksrotd.ports import DeviceRef, HeaderDevice
from luksrotd.rotation.view import DeviceView, view

#: Which areas to read, of a volume that looks like this.
Areas = Callable[[DeviceView], tuple[Extent, ...]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Both header copies and the areas that were asked for, read under the shared metadata lock (but for a glance)."""

    view: DeviceView
    areas: Mapping[Extent, bytes]

    @property
    def pair(self) -> Pair:
        """The two copies."""
        return self.view.pair


def read_snapshot(ref: DeviceRef, device: HeaderDevice, areas: Areas) -> Snapshot:
    """Read the open ``device``, past the page cache; blocks.  Raises ``FormatError``, ``DeviceError``, and
    ``UnknownDevice`` for another volume than ``ref`` means.
    """
    seen = view(read_pair(device.read_medium, device.size))
    if ref.uuid is not None and seen.uuid != ref.uuid:
        raise UnknownDevice(f"cannot use {ref.metadata_path}: it holds the volume {seen.uuid}, not {ref.uuid}")
    return Snapshot(seen, {area: device.read_medium(area.offset, area.size) for area in areas(seen)})


def read_lost(ref: DeviceRef, device: HeaderDevice, length: int, headers: int) -> bytes:
    """The first ``headers`` bytes of an open device that has lost both header copies, past the page cache; blocks.

    It must have room for a header area of ``length`` bytes.  Raises ``InvalidRequest`` if it has a header, ``NotLuks2``
    for LUKS1, and ``FormatError`` if it is too small or has a header that only libcryptsetup may understand.
    """
    if device.size < length:
        raise FormatError(f"cannot use {ref.metadata_path}: the header needs {length} bytes, it has {device.size}")
    if not is_lost(device.read_medium, device.size):
        raise InvalidRequest(f"cannot take the header of {ref.metadata_path} for lost: a copy of it is there")
    return device.read_medium(0, headers)


def no_areas(_: DeviceView) -> tuple[Extent, ...]:
    """None: the headers are enough."""
    return ()


def all_areas(seen: DeviceView) -> tuple[Extent, ...]:
    """Every area that a copy references."""
    return seen.pair.referenced


def unlocking_areas(seen: DeviceView) -> tuple[Extent, ...]:
    """The areas that a credential may need: those of all keyslots that open the volume."""
    return tuple(slot.area for slot in seen.metadata.keyslots.values() if seen.metadata.opens_volume(slot.id))
