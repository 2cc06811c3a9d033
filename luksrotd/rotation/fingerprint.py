# SPDX-License-Identifier: GPL-2.0-or-later
"""The fingerprint by which a token recognises its keyslot."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def fingerprint(keyslot: Mapping[str, Any]) -> str:
    """Hash of the kdf salt and the area offset in the JSON of a keyslot: both change whenever its key does."""
    identity = {"salt": keyslot["kdf"]["salt"], "offset": keyslot["area"]["offset"]}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
