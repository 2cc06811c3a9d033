# SPDX-License-Identifier: GPL-2.0-or-later
"""How a user names a volume."""

import os
import re
from typing import Final

_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_PREFIX: Final = "UUID="


def uuid_of(name: str) -> str | None:
    """The LUKS UUID in ``UUID=…`` or a bare UUID; ``None`` for a path, also one that only looks like a UUID."""
    if name.startswith(_PREFIX):
        return name.removeprefix(_PREFIX).lower()
    return name.lower() if _UUID.fullmatch(name) and not os.path.lexists(name) else None
