# SPDX-License-Identifier: GPL-2.0-or-later
"""What luksrotd refuses to do to a volume, before anything is written; the decisions stand on these checks."""

from collections.abc import Iterable, Mapping
from typing import Any, Final, assert_never

from luksrotd.errors import (
    ForeignSignature,
    InvalidRequest,
    LastKeyslot,
    MetadataFull,
    NeedsPerson,
    NeedsReconcile,
    NoFreeArea,
    NoFreeKeyslot,
    RequirementsPresent,
    StaleGeneration,
    UnknownKey,
)
from luksrotd.luks2 import jsontext, layout, metadata
from luksrotd.rotation.change import Change
from luksrotd.rotation.edits import AddKeyslot, DestroyKeyslot, Edit, RemoveToken, SetToken
from luksrotd.rotation.lineage import Lineage, lineage
from luksrotd.rotation.view import DeviceView, ManagedKey

#: Room for what libcryptsetup adds to the JSON with a keyslot (its object with an argon2id kdf, its digest entry).
KEYSLOT_JSON_MAX: Final = 512
#: Room for the fingerprint that the worker adds to a token.
FINGERPRINT_JSON_MAX: Final = 96


def managed(view: DeviceView, name: str) -> ManagedKey:
    """The managed key of that name that is in force; raises ``UnknownKey``, ``NeedsPerson`` or ``NeedsReconcile``."""
    current = known(view, name).current
    if current is None:
        raise UnknownKey(f"cannot find an active key named {name!r}: it is only staged")
    return current


def known(view: DeviceView, name: str) -> Lineage:
    """All keys of that name, one at least; raises as ``managed`` does."""
    if view.pair.doubt:
        raise NeedsReconcile(f"cannot tell which header copy is in force: {view.pair.doubt}")
    line = lineage(view, name)
    if line.unclear:
        raise NeedsPerson(f"cannot choose between the keys named {name!r}: {line.unclear}; see luksrotctl reconcile")
    if line.current is None and line.staged is None:
        raise UnknownKey(f"cannot find a managed key named {name!r}")
    return line


def complete(key: ManagedKey, verb: str) -> ManagedKey:
    """``key`` if it is as we wrote it; raises ``NeedsPerson``."""
    if not key.complete:
        raise NeedsPerson(f"cannot {verb} key {key.token.name!r}: {key.oddity}; see luksrotctl reconcile")
    return key


def check_writable(view: DeviceView) -> None:
    """Refuse volumes on which luksrotd does not write; raises a refusal."""
    check_requirements(view)
    if not view.pair.agree:
        raise NeedsReconcile("cannot change the volume: its two header copies differ; reconcile it first")
    if view.pending:
        raise NeedsReconcile("cannot change the volume: a retired key has not been wiped yet; reconcile it first")


def check_requirements(view: DeviceView) -> None:
    """Raise ``RequirementsPresent`` if the header forbids third parties to write (LUKS2 specification, section 3.5)."""
    mandatory = view.metadata.config.mandatory
    if mandatory:
        raise RequirementsPresent(
            f"cannot change the volume: its header requires {', '.join(mandatory)}; finish that with cryptsetup"
        )


def check_sequence(view: DeviceView, seqid: int | None) -> None:
    """Raise ``StaleGeneration`` unless the header is at sequence number ``seqid``; ``None``: at any."""
    if seqid is not None and view.seqid != seqid:
        raise StaleGeneration(f"cannot change the volume: its header is at sequence number {view.seqid}, not {seqid}")


def check_signatures(foreign: tuple[str, ...]) -> None:
    """Raise ``ForeignSignature`` if libcryptsetup's own recovery would stumble (lib/utils_blkid.c)."""
    if foreign:
        raise ForeignSignature(
            f"cannot change the volume: it also carries signatures of {', '.join(foreign)}, which would stop "
            "libcryptsetup from recovering the header; see wipefs(8)"
        )


def check_retirement(view: DeviceView, change: Change) -> None:
    """Raise ``LastKeyslot`` if nothing would open the volume any more (invariant I5)."""
    if change.destroyed and not ways_in(view, without=change.destroyed) and not change.added:
        raise LastKeyslot("cannot remove the last keyslot that opens the volume; add another one first, or with it")


def check_room(view: DeviceView, edits: Iterable[Edit]) -> None:
    """Refuse early what libcryptsetup would refuse on the shadow; raises ``NoFreeArea`` or ``MetadataFull``.

    The metadata area must hold what stands there at the fullest moment, in the order of ``edits``.  Raises
    ``InvalidRequest`` for a token that libcryptsetup could not read back.
    """
    edits = tuple(edits)
    _check_areas(view, sum(isinstance(edit, AddKeyslot) for edit in edits))
    raw: dict[str, Any] = {**view.metadata.raw, "tokens": dict(view.metadata.raw["tokens"])}
    keyslots, limit = dict(raw["keyslots"]), view.metadata.config.json_size
    reserved = 0
    for edit in edits:
        match edit:
            case AddKeyslot():
                reserved += KEYSLOT_JSON_MAX
            case SetToken(token, body, fingerprint_of):
                _check_depth(token, body)
                raw["tokens"][str(token)] = body
                reserved += 0 if fingerprint_of is None else FINGERPRINT_JSON_MAX
            case RemoveToken(token):
                raw["tokens"].pop(str(token), None)
            case DestroyKeyslot(keyslot):
                keyslots.pop(str(keyslot), None)
            case _ as unreachable:  # pragma: no cover - mypy proves it
                assert_never(unreachable)
        if isinstance(edit, AddKeyslot | SetToken):
            size = len(metadata.serialise({**raw, "keyslots": keyslots})) + reserved
            if size >= limit:
                raise MetadataFull(
                    f"cannot change the volume: what has to be written does not fit into its metadata area of {limit} "
                    "bytes; use less associated data, or remove keyslots or tokens first"
                )


def free_keyslot(view: DeviceView) -> int:
    """The lowest free keyslot number; raises ``NoFreeKeyslot``."""
    keyslot = view.free_keyslot()
    if keyslot is None:
        raise NoFreeKeyslot(f"cannot add a keyslot: all {layout.KEYSLOTS_MAX} are taken; remove one first")
    return keyslot


def free_token(view: DeviceView) -> int:
    """The lowest free token number; raises ``NoFreeKeyslot``."""
    token = view.free_token()
    if token is None:
        raise NoFreeKeyslot(f"cannot add a token: all {layout.TOKENS_MAX} are taken; remove one first")
    return token


def ways_in(view: DeviceView, without: Iterable[int] = ()) -> frozenset[int]:
    """The keyslots that open the volume, but for some."""
    return frozenset(slot for slot in view.metadata.keyslots if view.metadata.opens_volume(slot)) - set(without)


def _check_depth(token: int, body: Mapping[str, Any]) -> None:
    if any(depth > jsontext.TOKEN_DEPTH_MAX for _, depth in jsontext.walk(body)):
        raise InvalidRequest(f"cannot write token {token}: it is nested deeper than {jsontext.TOKEN_DEPTH_MAX} levels")


def _check_areas(view: DeviceView, count: int) -> None:
    """Whether ``count`` new areas fit beside all that is referenced, first fit, as libcryptsetup places them."""
    if not count:
        return
    sizes = [view.metadata.keyslots[keyslot].key_size for keyslot in ways_in(view)]
    if not sizes:
        raise NoFreeArea("cannot add a keyslot: no keyslot opens the volume, so its key size is unknown")
    size = layout.keyslot_area_size(max(sizes))
    if sum(gap.size // size for gap in view.free) < count:
        raise NoFreeArea(
            f"cannot add a keyslot: {count} times {size} bytes in a row are not free in the keyslots area, beside what "
            "is still referenced; remove a keyslot first"
        )
