# SPDX-License-Identifier: GPL-2.0-or-later
"""What a transaction starts from: both header copies, and the keyslot areas that it needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from luksrotd.errors import UnknownDevice
from luksrotd.luks2.areas import Extent
from luksrotd.luks2.pair import Pair, read_pair
from luksrotd.ports import DeviceRef, HeaderDevice
from luksrotd.rotation.view import DeviceView, view

#: Which areas to read, of a volume that looks like this.
Areas = Callable[[DeviceView], tuple[Extent, ...]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Both header copies and the keyslot areas that were asked for, read under the shared metadata lock."""

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


def no_areas(_: DeviceView) -> tuple[Extent, ...]:
    """None: the headers are enough."""
    return ()


def unlocking_areas(seen: DeviceView) -> tuple[Extent, ...]:
    """The areas that a credential may need: those of all keyslots that open the volume."""
    return tuple(slot.area for slot in seen.metadata.keyslots.values() if seen.metadata.opens_volume(slot.id))
