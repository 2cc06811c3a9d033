# SPDX-License-Identifier: GPL-2.0-or-later
"""The language between the daemon (or ``luksrotctl --direct``) and its worker: one JSON object a line, both ways.

========  ===========================================================  ==================================
op        members                                                      result
========  ===========================================================  ==================================
start     shadow: n, secret_seconds: float,                            null
          secrets: {name: {"fd": n, "limit": bytes} | {"generate": n}
          | {"token": n or null (any), "pin": {"fd": n, "limit":
          bytes} or null}}
load                                                                   the JSON metadata
unlock    keyslot: int or null (any), volume_key: bool                 the keyslot that was opened, or null
apply     edits: [``edits.to_wire``, …]                                null
opens     keyslot: int, secret: name                                   bool
========  ===========================================================  ==================================

A reply is ``{"ok": true, "result": …}`` or ``{"ok": false, "error": code, "message": text}``, after which the worker
exits.  ``start`` comes first and once, and with it descriptors (SCM_RIGHTS, unix(7)): ``n`` is the place of one among
them, from 0.  Secrets go by descriptor; no line ever holds one.  Neither end trusts the other further than this module
checks.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from luksrotd.errors import EngineError, InvalidRequest, LuksrotdError, leaves
from luksrotd.luks2 import jsontext

#: Longest line, in bytes: the JSON area of the largest LUKS2 header is just below 4 MiB, and escapes make it longer.
MAX_LINE: Final = 32 * 1024 * 1024
#: Longest message that is taken over from a worker, in characters.
MAX_MESSAGE: Final = 500
#: What a worker may say.  It parses hostile headers: it must not be able to claim, say, a conflict on the device.
CODES: Final = frozenset(
    {
        "BadFormat",
        "EngineFailed",
        "Internal",
        "InvalidArgs",
        "MetadataFull",
        "NoFreeArea",
        "NoFreeKeyslot",
        "SecretRejected",
        "WrongCredential",
    }
)


def encode(line: Mapping[str, Any]) -> bytes:
    """The line, with its newline.  Raises ``InvalidRequest`` for what is not JSON or too long."""
    try:
        encoded = json.dumps(line, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest("cannot send a line: it is not JSON") from error
    if len(encoded) > MAX_LINE:
        raise InvalidRequest(f"cannot send a line: it is longer than {MAX_LINE} bytes")
    if jsontext.too_many_values(encoded):
        raise InvalidRequest("cannot send a line: it has too many values")
    return encoded


def decode(line: bytes) -> dict[str, Any]:
    """The object on the line.  Raises ``EngineError``."""
    if jsontext.too_many_values(line):
        raise EngineError("cannot understand the worker: too many values")
    try:
        decoded = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EngineError("cannot understand the worker: not JSON") from error
    if not isinstance(decoded, dict):
        raise EngineError("cannot understand the worker: not an object")
    return decoded


def success(result: Any) -> bytes:
    """The reply that all went well."""
    return encode({"ok": True, "result": result})


def failure(error: LuksrotdError) -> bytes:
    """The reply that it did not."""
    return encode({"ok": False, "error": error.code, "message": error.message})


def result_of(line: bytes) -> Any:
    """The result in a reply; raises the error in it, and ``EngineError`` for what is no reply."""
    reply = decode(line)
    if reply.get("ok") is True:
        return reply.get("result")
    code, message = reply.get("error"), reply.get("message")
    if reply.get("ok") is not False or not isinstance(code, str) or not isinstance(message, str):
        raise EngineError("cannot understand the worker: malformed reply")
    message = "".join(c if c.isprintable() else "?" for c in message[:MAX_MESSAGE])
    if code not in CODES:
        raise EngineError(f"cannot understand the worker: it says {code[:MAX_MESSAGE]!r}")
    raise leaves()[code](message)
