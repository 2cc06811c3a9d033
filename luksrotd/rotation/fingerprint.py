# SPDX-License-Identifier: GPL-2.0-or-later
"""How a token recognises its keyslot again (docs/spec/token.md, "fingerprint")."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from luksrotd.errors import FormatError


def fingerprint(keyslot: Mapping[str, Any]) -> str:
    """``sha256:`` and the hex digest of where the keyslot's area is and what its key derivation is salted with.

    A tool that changes the passphrase in place draws a new salt, one that moves the keyslot a new offset.
    ``keyslot`` is the keyslot's JSON object.  Raises ``FormatError`` where it has no salt or offset (a keyslot of
    another type than ``luks2``).
    """
    try:
        seen = {"salt": keyslot["kdf"]["salt"], "offset": keyslot["area"]["offset"]}
    except (KeyError, TypeError) as error:
        raise FormatError("cannot take the fingerprint of a keyslot: it has no salt or no area") from error
    canonical = json.dumps(seen, sort_keys=True, separators=(",", ":")).encode()
    return f"sha256:{hashlib.sha256(canonical).hexdigest()}"
