# SPDX-License-Identifier: GPL-2.0-or-later
"""What must hold whatever is on a disk, in a token or on the wire; held by tests/property and tests/fuzz.

Each check takes something hostile and returns, or raises ``AssertionError``; only errors of ours may come out of the
product, with short messages.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from operator import methodcaller
from typing import Any, Final

from luksrotd.cryptsetup.api import Context
from luksrotd.errors import MESSAGE_MAX, EngineError, LuksrotdError
from luksrotd.luks2 import jsontext, layout, metadata
from luksrotd.luks2.areas import overlapping
from luksrotd.luks2.metadata import Token
from luksrotd.luks2.pair import parse_pair, read_pair
from luksrotd.names import TOKEN_TYPE, WIPE_TOKEN_TYPE
from luksrotd.rotation import adoption, keys, lineage, policy, reconcile, restore, staging, wire
from luksrotd.rotation import token as tokens
from luksrotd.rotation.adoption import AdoptRequest, RecreateRequest
from luksrotd.rotation.change import Change
from luksrotd.rotation.draft import Draft
from luksrotd.rotation.edits import PBKDF_FOR_RANDOM_KEYS, AddKeyslot, SetToken, from_wire, to_wire
from luksrotd.rotation.keys import EnrollRequest, RotateRequest
from luksrotd.rotation.preview import preview, restored
from luksrotd.rotation.staging import StageRequest
from luksrotd.rotation.token import Group
from luksrotd.rotation.view import DeviceView, view

NOW: Final = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
DATA: Final = {"ref": "vault/9"}
#: Keys and keyslots of a hostile header on which every verb is tried: enough for every branch.
TRIED: Final = 4

Decide = Callable[[], Change | None]


def check_message(message: str) -> None:
    """A message is short and harmless to a terminal."""
    assert len(message) <= MESSAGE_MAX, f"a message of {len(message)} characters: {message[:200]}"
    assert message.isprintable(), f"a message with control characters: {message[:200]!r}"


@contextmanager
def refusals() -> Iterator[None]:
    """Errors of ours are an answer."""
    try:
        yield
    except LuksrotdError as error:
        check_message(error.message)


def seen_in(headers: bytes, size: int) -> DeviceView | None:
    """What we make of a device of ``size`` bytes that begins with ``headers``, zeros behind; ``None`` if we refuse."""

    def read(offset: int, length: int) -> bytes:
        return headers[offset : min(offset + length, size)].ljust(length, b"\0")

    try:
        return view(read_pair(read, size))
    except LuksrotdError as error:
        check_message(error.message)
        return None


def check_header(headers: bytes, size: int) -> DeviceView | None:
    """The whole way from the bytes to every decision; where one would write, libcryptsetup must read what we read."""
    seen = seen_in(headers, size)
    if seen is None:
        return None
    changes = dict(check_decisions(seen))
    if (changes or reconcile.needs_heal(seen)) and not seen.pair.doubt:
        read = libcryptsetup_reads(headers, size)
        assert read is not None, f"libcryptsetup rejects a header on which we would do {[*changes, 'heal'][0]}"
        assert read == seen.metadata.raw, "libcryptsetup reads the header otherwise than we"
    return seen


def check_backup(image: bytes, content: bytes) -> None:
    """A backup file for the volume in ``image``: refused, or libcryptsetup reads the header that it makes as we do."""
    seen = view(parse_pair(image))
    areas = {area: image[area.offset : area.end] for area in seen.pair.referenced}
    with refusals():
        backup = restore.read_backup(content)
        decisions: tuple[Callable[[], Change], ...] = (
            partial(restore.prepare, seen, areas, backup, prove=True),
            partial(restore.prepare_lost, bytes(len(seen.pair.raw)), backup),
        )
        for prepare in decisions:
            with refusals():
                change = prepare()
                if change.start is None:
                    continue
                headers, metadata = change.start.pair.raw, change.start.metadata
                assert libcryptsetup_reads(headers, len(image)) == metadata.raw
                assert set(change.start.areas) == set(metadata.areas)
                assert {key.token.name for key in view(change.start.pair).keys} == {
                    key.token.name for key in backup.view.keys
                }
                restored(seen, change, change.start)
        change = restore.prepare(seen, areas, backup)
        if change.start is not None:
            for area in change.start.areas:
                taken = [other for other in seen.pair.referenced if other.overlaps(area)]
                assert taken in ([], [area])


def libcryptsetup_reads(headers: bytes, size: int) -> Mapping[str, Any] | None:
    """The JSON metadata that libcryptsetup reads off such a device; ``None`` if it rejects it."""
    fd = os.memfd_create("hostile")
    try:
        os.truncate(fd, size)
        os.pwrite(fd, headers[:size], 0)
        with Context(f"/proc/self/fd/{fd}") as context:
            return context.metadata()
    except EngineError:
        return None
    finally:
        os.close(fd)


def check_decisions(seen: DeviceView) -> Iterator[tuple[str, Change]]:
    """Every decision that gives a change, by its name; each change is one that can be made."""
    findings = reconcile.diagnose(seen)
    for finding in findings:
        check_message(finding.message)
    for line in lineage.lineages(seen):
        check_message(line.unclear)
    for name, decide in _decisions(seen):
        change = None
        with refusals():
            change = decide()
            if change is not None:
                policy.check_retirement(seen, change)
                preview(seen, change)
                check_change(seen, change)
        if change is not None:
            yield name, change


def check_change(seen: DeviceView, change: Change) -> None:
    """A change names what is there, takes what is free, and wipes what nobody has (I4)."""
    there, space = seen.metadata, seen.metadata.keyslots_area
    assert not seen.metadata.config.mandatory
    assert all(edit.keyslot not in there.keyslots for edit in change.added)
    assert all(keyslot in there.keyslots for keyslot in change.destroyed)
    for extent in change.wipe:
        assert space.contains(extent), f"wipes {extent}"
        assert not overlapping(extent, seen.pair.referenced), f"wipes {extent}"
    for edit in (*change.edits, *change.closing):
        if isinstance(edit, SetToken):
            assert 0 <= edit.token < layout.TOKENS_MAX or edit.token in there.tokens
            assert jsontext.load(metadata.serialise(edit.body) + b"\0") == edit.body


def _decisions(seen: DeviceView) -> Iterator[tuple[str, Decide]]:
    keyslots = sorted(seen.metadata.keyslots)[:TRIED]
    yield "repair", lambda: reconcile.repair(seen)
    yield "enroll", lambda: keys.enroll(seen, EnrollRequest(DATA, NOW, PBKDF_FOR_RANDOM_KEYS, "fresh"))
    groups = {key.token.name: key.token.group.id for key in seen.keys if key.token.group}
    for name in sorted({key.token.name for key in seen.keys})[:TRIED]:
        rotation = RotateRequest(None, NOW, PBKDF_FOR_RANDOM_KEYS, name)
        yield f"rotate {name}", partial(keys.rotate, seen, rotation)
        yield f"remove {name}", partial(keys.remove, seen, name)
        yield f"set-data {name}", partial(keys.set_data, seen, name, DATA)
        yield f"stage {name}", partial(staging.stage, seen, StageRequest(rotation, NOW, Group("set", 2)))
        yield f"finish {name}", partial(staging.finish, seen, name, group=groups.get(name))
        yield f"abort {name}", partial(staging.abort, seen, name, group=groups.get(name))
        yield f"release {name}", partial(adoption.release, seen, name)
        for keyslot in (None, *keyslots[:2]):
            request = RecreateRequest(None, NOW, PBKDF_FOR_RANDOM_KEYS, name, keyslot)
            yield f"recreate {name} {keyslot}", partial(adoption.recreate, seen, request)
    for keyslot in keyslots:
        yield f"adopt {keyslot}", partial(adoption.adopt, seen, AdoptRequest(keyslot, DATA, NOW, "taken"))
        yield f"destroy {keyslot}", partial(_draft, seen, methodcaller("destroy_keyslot", keyslot))
    for number in sorted(seen.metadata.tokens)[:TRIED]:
        yield f"remove token {number}", partial(_draft, seen, methodcaller("remove_token", number))
    new = {"type": "other", "keyslots": [str(keyslot) for keyslot in keyslots]}
    yield "set token", partial(_draft, seen, lambda draft: draft.set_token(new))


def _draft(seen: DeviceView, edit: Callable[[Draft], object]) -> Change:
    draft = Draft(seen)
    edit(draft)
    return draft.change()


def check_token(raw: Mapping[str, Any]) -> None:
    """What we can read of a token, we write back as the same."""
    with refusals():
        found = tokens.parse(Token(1, TOKEN_TYPE, (0,), raw))
        again = tokens.body(found)
        assert jsontext.load(metadata.serialise(again) + b"\0") == again
        assert tokens.parse(Token(1, TOKEN_TYPE, (0,), again)) == found
        for member in found.extra:
            assert again[member] == raw[member]
        tokens.moment(found.rotated_at)
        tokens.moment(found.expires_at)
    with refusals():
        record = tokens.parse_record(Token(1, WIPE_TOKEN_TYPE, (), raw))
        assert tokens.parse_record(Token(1, WIPE_TOKEN_TYPE, (), tokens.record(record.wipe))) == record


def check_text(text: bytes) -> None:
    """The text of a JSON area: refused, or the same after it has been written and read again."""
    with refusals():
        loaded = jsontext.load(text)
        assert jsontext.load(metadata.serialise(loaded) + b"\0") == loaded
        metadata.validate(loaded, layout.HEADER_SIZES[0])
    with refusals():
        data = tokens.parse_data(text.decode("utf-8", "surrogateescape"))
        assert jsontext.load(metadata.serialise({"x": data}) + b"\0") == {"x": data}


def check_wire(line: bytes) -> None:
    """A line from a worker or to one: an object, an error of ours, or an edit that is sent as it came."""
    with refusals():
        wire.result_of(line)
    with refusals():
        request = wire.decode(line)
        with refusals():
            edit = from_wire(request)
            assert exact(to_wire(edit)) == exact(request), "an edit that to_wire cannot have written"
            if isinstance(edit, AddKeyslot):
                costs = (edit.pbkdf.iterations, edit.pbkdf.memory_kib, edit.pbkdf.parallel)
                assert all(cost is None or type(cost) is int for cost in costs)
                assert edit.pbkdf.hash is None or isinstance(edit.pbkdf.hash, str)
            wire.encode(to_wire(edit))


def exact(value: object) -> str:
    """JSON text in which 1, 1.0 and true differ, and the order of members does not."""
    return json.dumps(value, sort_keys=True)
