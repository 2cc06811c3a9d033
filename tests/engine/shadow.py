# SPDX-License-Identifier: GPL-2.0-or-later
"""The plainest shadow: the headers and keyslots of an image, in a sparse memfd."""

import os
import struct
from collections.abc import Sequence
from pathlib import Path

from luksrotd.luks2.areas import Extent
from tests.support.makeimage import luks_dump_json


class PlainShadow:
    def __init__(self, length: int) -> None:
        self.fd = os.memfd_create("shadow", os.MFD_CLOEXEC)
        self.length = length
        os.ftruncate(self.fd, length)

    def write(self, offset: int, data: bytes) -> None:
        assert os.pwrite(self.fd, data, offset) == len(data)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset)

    def data_extents(self) -> Sequence[Extent]:
        return [Extent(0, self.length)]

    def close(self) -> None:
        os.close(self.fd)

    def save(self, path: Path) -> Path:
        path.write_bytes(self.read(0, self.length))
        return path


def shadow_of(image: Path) -> PlainShadow:
    metadata = luks_dump_json(image)
    with image.open("rb") as file:
        header_size = struct.unpack_from(">Q", file.read(16), 8)[0]
        shadow = PlainShadow(2 * header_size + int(metadata["config"]["keyslots_size"]))
        areas = [keyslot["area"] for keyslot in metadata["keyslots"].values()]
        for offset, size in [(0, 2 * header_size), *((int(area["offset"]), int(area["size"])) for area in areas)]:
            file.seek(offset)
            shadow.write(offset, file.read(size))
    return shadow


def memfd(content: bytes = b"") -> int:
    fd = os.memfd_create("secret", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd
