# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether two headers differ by exactly the edits that were asked for, and by nothing else (invariants I3, I5)."""

import copy
from typing import Any, NoReturn, assert_never

from luksrotd.errors import ConsistencyError
from luksrotd.luks2 import layout
from luksrotd.luks2.metadata import Keyslot, Metadata
from luksrotd.luks2.pair import HeaderCopy
from luksrotd.rotation.edits import AddKeyslot, DestroyKeyslot, Edit, RemoveToken, SetToken
from luksrotd.rotation.fingerprint import fingerprint

Json = dict[str, Any]
#: What lies between the fields and the checksum of a binary header.
PADDING = slice(264, layout.CSUM_OFFSET)
#: What libcryptsetup writes of a keyslot, beside its kdf.
_KEYSLOT_MEMBERS = {
    "": {"type", "key_size", "af", "area", "kdf"},
    "af": {"type", "stripes", "hash"},
    "area": {"type", "offset", "size", "encryption", "key_size"},
}


def check_difference(before: HeaderCopy, after: HeaderCopy, edits: tuple[Edit, ...]) -> None:
    """Raise ``ConsistencyError`` unless ``edits`` explain every difference between the two."""
    if not edits:
        if after.raw != before.raw:
            _reject(f"the {before.header.which} header, which should have stayed as it was")
        return
    if any(after.raw[PADDING]) or any(after.raw[layout.FIELDS_SIZE : layout.BINARY_SIZE]):
        _reject(f"the padding of the {before.header.which} header")
    for field in ("uuid", "label", "subsystem", "csum_alg", "hdr_size", "salt", "which"):
        if getattr(before.header, field) != getattr(after.header, field):
            _reject(f"the {field} of the {before.header.which} header")
    if after.header.seqid <= before.header.seqid:
        raise ConsistencyError("cannot explain the change: the sequence number did not rise")  # I9
    expected = _normal(_expected(before.metadata, after.metadata, edits))
    actual = _normal(copy.deepcopy(dict(after.metadata.raw)))
    for name in expected.keys() | actual.keys():
        if expected.get(name) != actual.get(name):
            _reject(_place(name, expected.get(name), actual.get(name)))


def mismatch(before: HeaderCopy, other: HeaderCopy) -> str:
    """Why ``other`` is not a header of the same data as ``before``; '' if it is one.

    It must be of the same volume, of the same layout, and hold the same volume key: then any of its keyslots opens
    the data.
    """
    if before.header.uuid != other.header.uuid:
        return f"it is of the volume {other.header.uuid}, not of {before.header.uuid}"
    ours, theirs = before.metadata, other.metadata
    if before.header.hdr_size != other.header.hdr_size or ours.keyslots_area != theirs.keyslots_area:
        return "the sizes of its metadata and keyslots areas are others"
    if ours.raw["segments"] != theirs.raw["segments"]:
        return "the data lies elsewhere, or is encrypted in another way"
    if _bound(ours) != _bound(theirs):
        return "it holds another volume key"
    return ""


def _bound(metadata: Metadata) -> list[Json]:
    """The digests of the data, without the keyslots that hold the key: type, salt, hash, iterations, digest."""
    digests = [dict(digest.raw) for digest in metadata.digests.values() if digest.segments]
    return sorted(({**digest, "keyslots": []} for digest in digests), key=lambda digest: sorted(digest["segments"]))


def _expected(before: Metadata, after: Metadata, edits: tuple[Edit, ...]) -> Json:
    """The JSON that ``before`` becomes by ``edits``; what libcryptsetup chooses (salts, offsets) is as in ``after``."""
    raw: Json = copy.deepcopy(dict(before.raw))
    for edit in edits:
        match edit:
            case AddKeyslot():
                _add_keyslot(raw, edit, before, after)
            case SetToken():
                _set_token(raw, edit)
            case RemoveToken(token):
                raw["tokens"].pop(str(token), None)
            case DestroyKeyslot(keyslot):
                if str(keyslot) not in raw["keyslots"]:
                    _reject(f"keyslot {keyslot}, which was not there to be removed")
                _remove_keyslot(raw, str(keyslot))
            case _ as unreachable:  # pragma: no cover - mypy proves it
                assert_never(unreachable)
    return raw


def _add_keyslot(raw: Json, edit: AddKeyslot, before: Metadata, after: Metadata) -> None:
    added = after.keyslots.get(edit.keyslot)
    if added is None or edit.keyslot in before.keyslots:
        _reject(f"keyslot {edit.keyslot}, which should have been added")
    _check_added(added, edit, before)
    holders = [digest for digest in after.digests.values() if edit.keyslot in digest.keyslots]
    if len(holders) != 1 or not holders[0].segments or holders[0].id not in before.digests:
        _reject(f"the digest of keyslot {edit.keyslot}")
    raw["keyslots"][str(edit.keyslot)] = copy.deepcopy(dict(added.raw))
    raw["digests"][str(holders[0].id)]["keyslots"].append(str(edit.keyslot))
    if edit.token is not None:
        token = raw["tokens"].get(str(edit.token))
        if token is None:
            _reject(f"keyslot {edit.keyslot}, born with a token that is not there")
        token["keyslots"] = [*token["keyslots"], str(edit.keyslot)]


def _check_added(added: Keyslot, edit: AddKeyslot, before: Metadata) -> None:
    """The new keyslot must be of the kind that was asked for, as strong as the others."""
    sizes = {keyslot.key_size for keyslot in before.keyslots.values() if before.opens_volume(keyslot.id)}
    kdf = added.raw.get("kdf", {})
    cost = edit.pbkdf
    wanted = {
        "type": cost.type,
        "hash": cost.hash,
        "iterations" if cost.type == "pbkdf2" else "time": cost.iterations,
    }
    if added.type != "luks2" or added.key_size not in sizes or added.priority == layout.PRIORITY_IGNORE:
        _reject(f"the type, key size or priority of keyslot {edit.keyslot}")
    parts = {"": added.raw, "af": added.raw["af"], "area": added.raw["area"]}
    if any(parts[name].keys() != members for name, members in _KEYSLOT_MEMBERS.items()):
        _reject(f"the members of keyslot {edit.keyslot}")
    if added.raw["af"]["stripes"] != layout.STRIPES or "null" in added.raw["area"]["encryption"]:
        _reject(f"the protection of keyslot {edit.keyslot}")
    # libcryptsetup 2.6 lowers a forced memory cost to half of the machine's memory; it never raises one.
    too_much = cost.memory_kib is not None and kdf.get("memory", 0) > cost.memory_kib
    if too_much or any(value is not None and kdf.get(member) != value for member, value in wanted.items()):
        _reject(f"the key derivation of keyslot {edit.keyslot}")


def _set_token(raw: Json, edit: SetToken) -> None:
    raw["tokens"][str(edit.token)] = written = dict(edit.body)
    if edit.fingerprint_of is not None:
        keyslot = raw["keyslots"].get(str(edit.fingerprint_of))
        if keyslot is None:
            _reject(f"token {edit.token}, bound to a keyslot that is not there")
        written["fingerprint"] = fingerprint(keyslot)


def _remove_keyslot(raw: Json, keyslot: str) -> None:
    del raw["keyslots"][keyslot]
    for owner in (*raw["digests"].values(), *raw["tokens"].values()):
        owner["keyslots"] = [reference for reference in owner["keyslots"] if reference != keyslot]


def _normal(raw: Json) -> Json:
    """Order of references does not matter; a digest of nothing is dropped by libcryptsetup at any write."""
    for owner in (*raw["digests"].values(), *raw["tokens"].values()):
        owner["keyslots"] = sorted(owner["keyslots"])
    raw["digests"] = {n: digest for n, digest in raw["digests"].items() if digest["keyslots"] or digest["segments"]}
    return raw


def _place(name: str, expected: object, actual: object) -> str:
    """Which member of the top-level object ``name`` differs, without its content."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        odd = [key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key)]
        return f"{name} {', '.join(sorted(map(str, odd)))[:100]}"
    return name


def _reject(what: str) -> NoReturn:
    raise ConsistencyError(f"cannot explain a difference between the header and its shadow: {what}")
