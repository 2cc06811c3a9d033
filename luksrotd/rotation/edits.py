# SPDX-License-Identifier: GPL-2.0-or-later
"""The edits that a worker may make on a shadow, and their wire form.

Every number (keyslot, token) is chosen by the planner beforehand, never "any": so the planner knows exactly what
difference to expect.  The wire form is JSON-ready (dict, list, str, int, None); the worker trusts it no further than
``from_wire`` checks it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, Final, TypeVar, assert_never

from luksrotd.errors import InvalidRequest
from luksrotd.records import dataclass

T = TypeVar("T")

PBKDF_TYPES: Final = ("argon2id", "argon2i", "pbkdf2")

#: Names under which a session knows its secrets.
UNLOCK: Final = "unlock"
NEW: Final = "new"
#: In place of ``UNLOCK``: the volume key itself.
VOLUME_KEY: Final = "volume-key"

#: libcryptsetup's lower bounds for forced costs (lib/utils_pbkdf.c: verify_pbkdf_params).
MIN_ITERATIONS: Final = {"pbkdf2": 1000, "argon2i": 4, "argon2id": 4}
MIN_MEMORY_KIB: Final = 32
MAX_MEMORY_KIB: Final = 4 * 1024 * 1024
MAX_PARALLEL: Final = 4


@dataclass(frozen=True, slots=True)
class Pbkdf:
    """Cost of a key derivation; ``None`` means libcryptsetup's default (benchmarked if no iterations are forced).

    ``iterations`` forces the count (time cost for argon2), ``memory_kib`` is in KiB, ``parallel`` in threads.
    Source: crypt_set_pbkdf_type(3), cryptsetup(8) ``--pbkdf*``.
    """

    type: str = "argon2id"
    hash: str | None = None
    iterations: int | None = None
    memory_kib: int | None = None
    parallel: int | None = None

    def __post_init__(self) -> None:
        if self.type not in PBKDF_TYPES:
            raise InvalidRequest(f"cannot use key derivation {self.type!r}: it must be one of {', '.join(PBKDF_TYPES)}")
        if self.type == "pbkdf2" and (self.memory_kib is not None or self.parallel is not None):
            raise InvalidRequest("cannot give memory or threads for pbkdf2: only argon2 takes them")
        if self.iterations is not None and not MIN_ITERATIONS[self.type] <= self.iterations < 2**32:
            raise InvalidRequest(
                f"cannot use {self.iterations} iterations: {self.type} takes at least {MIN_ITERATIONS[self.type]}"
            )
        if self.memory_kib is not None and not MIN_MEMORY_KIB <= self.memory_kib <= MAX_MEMORY_KIB:
            raise InvalidRequest(
                f"cannot use {self.memory_kib} KiB: argon2 takes {MIN_MEMORY_KIB} to {MAX_MEMORY_KIB} KiB"
            )
        if self.parallel is not None and not 1 <= self.parallel <= MAX_PARALLEL:
            raise InvalidRequest(f"cannot use {self.parallel} threads: argon2 takes 1 to {MAX_PARALLEL}")


#: For secrets that are random already (256 bit): a slow derivation adds nothing.
PBKDF_FOR_RANDOM_KEYS: Final = Pbkdf("pbkdf2", hash="sha512", iterations=1000)


@dataclass(frozen=True, slots=True)
class AddKeyslot:
    """Add keyslot number ``keyslot`` for the unlocked volume key, opened by the secret named ``secret``.

    ``token``: it is born assigned to that token, in one header write (``rotation.stepwise``).
    """

    keyslot: int
    secret: str = NEW
    pbkdf: Pbkdf = field(default_factory=Pbkdf)
    token: int | None = None


@dataclass(frozen=True, slots=True)
class SetToken:
    """Write token number ``token``.

    ``body`` is the whole JSON object.  With ``fingerprint_of`` the worker fills in the member ``"fingerprint"`` from
    that keyslot's JSON as it stands at that moment (its salt is only known once it has been added).
    """

    token: int
    body: Mapping[str, Any]
    fingerprint_of: int | None = None


@dataclass(frozen=True, slots=True)
class RemoveToken:
    """Remove token number ``token``."""

    token: int


@dataclass(frozen=True, slots=True)
class DestroyKeyslot:
    """Remove keyslot number ``keyslot`` and overwrite its area."""

    keyslot: int


Edit = AddKeyslot | SetToken | RemoveToken | DestroyKeyslot


def to_wire(edit: Edit) -> dict[str, Any]:
    """The JSON-ready form of ``edit``."""
    match edit:
        case AddKeyslot(keyslot, secret, pbkdf, token):
            cost = {name: getattr(pbkdf, name) for name in ("type", "hash", "iterations", "memory_kib", "parallel")}
            wire = {"edit": "add-keyslot", "keyslot": keyslot, "secret": secret, "pbkdf": cost}
            return wire if token is None else {**wire, "token": token}
        case SetToken(token, body, fingerprint_of):
            return {"edit": "set-token", "token": token, "body": dict(body), "fingerprint_of": fingerprint_of}
        case RemoveToken(token):
            return {"edit": "remove-token", "token": token}
        case DestroyKeyslot(keyslot):
            return {"edit": "destroy-keyslot", "keyslot": keyslot}
        case _ as unreachable:  # pragma: no cover - mypy proves it
            assert_never(unreachable)


def from_wire(wire: Mapping[str, Any]) -> Edit:
    """The edit that ``to_wire`` wrote; raises ``InvalidRequest`` for anything else."""
    try:
        edit = _from_wire(wire["edit"], wire)
        # As text: 1, 1.0, "1" and true are not the same there.
        same = json.dumps(to_wire(edit), sort_keys=True) == json.dumps(wire, sort_keys=True)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        raise InvalidRequest("cannot read an edit: it is malformed") from error
    if not same:
        raise InvalidRequest("cannot read an edit: it is not as it is written")
    return edit


def _from_wire(kind: str, wire: Mapping[str, Any]) -> Edit:
    match kind:
        case "add-keyslot":
            token = _optional(int, wire.get("token"))
            return AddKeyslot(int(wire["keyslot"]), str(wire["secret"]), _pbkdf(wire["pbkdf"]), token)
        case "set-token":
            return SetToken(int(wire["token"]), dict(wire["body"]), _optional(int, wire["fingerprint_of"]))
        case "remove-token":
            return RemoveToken(int(wire["token"]))
        case "destroy-keyslot":
            return DestroyKeyslot(int(wire["keyslot"]))
        case _:
            raise InvalidRequest(f"cannot read an edit: unknown kind {kind!r}")


def _pbkdf(wire: Mapping[str, Any]) -> Pbkdf:
    costs = {name: _optional(int, wire.get(name)) for name in ("iterations", "memory_kib", "parallel")}
    return Pbkdf(str(wire["type"]), _optional(str, wire.get("hash")), **costs)


def _optional(kind: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else kind(value)
