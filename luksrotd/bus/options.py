# SPDX-License-Identifier: GPL-2.0-or-later
"""The options of the verbs (dbus/*.xml), to what the service works with."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

from luksrotd.bus.convert import key_name
from luksrotd.bus.values import OptionTable
from luksrotd.config import Config, KeyDerivation, Staged
from luksrotd.errors import InvalidRequest
from luksrotd.rotation.edits import NEW, PBKDF_FOR_RANDOM_KEYS, UNLOCK, VOLUME_KEY, Pbkdf
from luksrotd.rotation.token import Group, check_group, parse_data
from luksrotd.service.jobs import Kind
from luksrotd.service.verbs import Wanted

DATA: Final[OptionTable] = {"data": "s"}
PBKDF: Final[OptionTable] = {
    "pbkdf": "s",
    "pbkdf-force-iterations": "u",
    "pbkdf-memory": "u",
    "pbkdf-parallel": "u",
}
IF_GENERATION: Final[OptionTable] = {"if-generation": "t"}
KEY_GENERATION: Final[OptionTable] = {"key-generation": "u"}
EXPIRES: Final[OptionTable] = {"expires": "t"}
GROUP: Final[OptionTable] = {"group": "s"}
#: Of the verbs by name.
KEY: Final[OptionTable] = {**DATA, **PBKDF, **IF_GENERATION}
STAGE: Final[OptionTable] = {**KEY, **EXPIRES}
STAGED: Final[OptionTable] = {**KEY_GENERATION, **GROUP, **IF_GENERATION}
ADOPT: Final[OptionTable] = {**DATA, **IF_GENERATION}
RECREATE: Final[OptionTable] = {**KEY, "volume-key": "b"}
RECONCILE: Final[OptionTable] = {"dry-run": "b", "retire-expired": "b"}
STAGE_SET: Final[OptionTable] = {**DATA, **PBKDF, **EXPIRES, **GROUP, "keep": "b"}

#: What ``Plan`` takes for which verb.
PLANNED: Final[Mapping[Kind, OptionTable]] = {
    Kind.ENROLL: {**DATA, **PBKDF},
    Kind.ROTATE: {**DATA, **PBKDF},
    Kind.STAGE: {**DATA, **PBKDF},
    Kind.FINISH: KEY_GENERATION,
    Kind.ABORT: KEY_GENERATION,
    Kind.SET_DATA: DATA,
    Kind.REMOVE: {},
    Kind.ADOPT: {**DATA, "keyslot": "u"},
    Kind.RELEASE: {},
    Kind.RECONCILE: {"retire-expired": "b"},
}
PLAN: Final[OptionTable] = {option: kind for table in PLANNED.values() for option, kind in table.items()}
_NEEDED: Final[Mapping[Kind, str]] = {Kind.SET_DATA: "data", Kind.ADOPT: "keyslot"}

DATA_MAX: Final = 4 * 1024 * 1024
"""Characters of associated data: more than the largest metadata area holds; not worth to be parsed."""
EXPIRES_MAX: Final = 100 * 365 * 24 * 3600
"""Seconds that a key may stay staged."""

_COSTS: Final = {
    "pbkdf": "type",
    "pbkdf-force-iterations": "iterations",
    "pbkdf-memory": "memory_kib",
    "pbkdf-parallel": "parallel",
}


def wanted(name: str, options: Mapping[str, Any], config: Config, *, generated: bool = False) -> Wanted:
    """What the options of a verb mean; raises ``InvalidRequest``.  ``generated``: the new secret will be random."""
    return Wanted(
        name,
        associated(options["data"]) if "data" in options else None,
        key_derivation(options, config.key_derivation, generated=generated),
        options.get("keyslot", 0),
        options.get("key-generation"),
        _expires(options, config.staged),
        options.get("if-generation"),
        group_id(options),
        options.get("keep", False),
    )


def planned(verb: str, name: str, options: Mapping[str, Any], config: Config) -> tuple[Kind, Wanted]:
    """The verb that is to be planned, and what its options mean; raises ``InvalidRequest``."""
    kind = next((kind for kind in PLANNED if kind.value == verb), None)
    if kind is None:
        raise InvalidRequest(f"cannot plan {verb[:64]!r}: the verbs are {', '.join(PLANNED)}")
    for option in options:
        if option not in PLANNED[kind]:
            raise InvalidRequest(f"cannot plan {verb}: it has no option {option!r}")
    if kind is Kind.RECONCILE and name:
        raise InvalidRequest("cannot plan reconcile of one key: it is about the whole volume")
    needed = _NEEDED.get(kind)
    if needed is not None and needed not in options:
        raise InvalidRequest(f"cannot plan {verb}: it needs the option {needed!r}")
    return kind, wanted(key_name(name), options, config)


def recreation(
    credential: Mapping[str, Any], new_secret: Mapping[str, Any], options: Mapping[str, Any]
) -> Mapping[str, Mapping[str, Any]]:
    """The secrets of Recreate, by their names in ``rotation.edits``; raises ``InvalidRequest``.

    Without a new secret only the token is made, for the keyslot that the credential opens.
    """
    by_volume_key = options.get("volume-key", False)
    if not new_secret:
        if by_volume_key:
            raise InvalidRequest("cannot recreate by the volume key without a new secret: it opens no keyslot")
        if any(option in PBKDF for option in options):
            raise InvalidRequest("cannot use the options of a key derivation: there is no new secret")
        return {UNLOCK: credential}
    if by_volume_key and "token" in credential:
        raise InvalidRequest("cannot take a token for the volume key: it gives a passphrase")
    return {VOLUME_KEY if by_volume_key else UNLOCK: credential, NEW: new_secret}


def reconciliation(options: Mapping[str, Any]) -> Mapping[str, bool]:
    """The options of Reconcile, as ``Operations.reconcile`` has them."""
    return {"dry_run": options.get("dry-run", False), "retire_expired": options.get("retire-expired", False)}


def retires(method: str, arguments: Sequence[Any]) -> bool:
    """Whether a call is a reconcile that aborts staged keys."""
    options = arguments[0] if method == "Reconcile" else {}
    return bool(options.get("retire-expired", False)) and not options.get("dry-run", False)


def group_id(options: Mapping[str, Any]) -> str | None:
    """The id of a set; raises ``InvalidRequest`` for one that no set can have."""
    given: str = options.get("group", "")
    return check_group(Group(given, 1)).id if given else None


def associated(text: str) -> Mapping[str, Any]:
    """Associated data; raises ``InvalidRequest``."""
    if len(text) > DATA_MAX:
        raise InvalidRequest(f"cannot use the associated data: it has more than {DATA_MAX} characters")
    return parse_data(text)


def key_derivation(options: Mapping[str, Any], default: KeyDerivation, *, generated: bool = False) -> Pbkdf:
    """The cost of a new keyslot: as the caller says, else as configured; raises ``InvalidRequest``.

    What is configured holds for one function, so a caller who takes another gets nothing of it.  A secret that is
    ``generated`` needs no slow derivation, unless the caller wants one.
    """
    given = {member: options[option] for option, member in _COSTS.items() if option in options}
    if generated and not given:
        return PBKDF_FOR_RANDOM_KEYS
    usual = default.type or Pbkdf().type
    function = given.setdefault("type", usual)
    costs = {"iterations": default.iterations, "memory_kib": default.memory_kib, "parallel": default.parallel}
    if function == usual:
        given = {**{member: cost for member, cost in costs.items() if cost is not None}, **given}
    return Pbkdf(**given)


def _expires(options: Mapping[str, Any], default: Staged) -> timedelta | None:
    """When a staged key counts as forgotten; ``None`` for never."""
    seconds = options.get("expires", default.expires_seconds)
    if not seconds:
        return None
    if seconds > EXPIRES_MAX:
        raise InvalidRequest(f"cannot stage for {seconds} seconds: {EXPIRES_MAX} are the most; 0 means for ever")
    return timedelta(seconds=seconds)
