# SPDX-License-Identifier: GPL-2.0-or-later
"""The text of a JSON area → an object (LUKS2 specification, section 3).

libcryptsetup reads the area with json-c, which is lax: comments, single quotes, members that come twice, names cut at
a NUL, integers clamped to 64 bits.  Text that could mean one thing to json-c and another to us is refused.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NoReturn

from luksrotd.errors import FormatError

#: Levels of nesting that json-c reads, a scalar counted as a level (JSON_TOKENER_DEFAULT_DEPTH).
DEPTH_MAX: Final = 32
#: The same within a token, which stands on the third level.
TOKEN_DEPTH_MAX: Final = DEPTH_MAX - 2

#: More values than any tool writes: each is an object in memory, 40 times as large as its text.
VALUES_MAX: Final = 2**17

#: NUL, at which C strings end, and lone surrogates, which are no text in UTF-8.
_ODD: Final = re.compile("[\0\ud800-\udfff]")

#: Every number that does not fit has 19 digits, or an exponent of three.
_LARGE: Final = re.compile(rb"[:,[\s]-?(?:[0-9]{19}|[0-9.]+[eE][-+]?[0-9]{3})")

_CONTAINERS: Final = (dict, list)

Json = Mapping[str, Any]


def load(area: bytes) -> Json:
    """The object in a JSON ``area``, which zeros must follow; raises ``FormatError``."""
    if not area.startswith(b"{"):
        _fail("the JSON area does not start with an object")
    end = area.find(b"\0")
    # Because rstrip looks at the bytes one by one: most of the time that a copy of 4 MiB takes.
    text = area[:end] if area[end:] == bytes(len(area) - end) else area.rstrip(b"\0")
    if len(text) == len(area):
        _fail("the JSON area is not terminated")
    if too_many_values(text):
        _fail("it has too many values")
    try:
        loaded = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_constant)
    except RecursionError as error:
        raise FormatError("cannot read LUKS2 metadata: it is nested too deeply") from error
    except ValueError as error:
        raise FormatError(f"cannot read LUKS2 metadata: not JSON: {error}") from error
    # An odd character can only be there as an escape.
    if b"\\u" in text or _LARGE.search(text) or not _is_shallow(loaded):
        _check_values(loaded)
    return loaded  # type: ignore[no-any-return]  # it starts with "{": a dict, or ValueError


def too_many_values(text: bytes) -> bool:
    """Whether JSON text may have more than ``VALUES_MAX`` values: before each there is a sign, which texts have too."""
    return sum(text.count(sign) for sign in (b",", b":", b"[", b"{")) > VALUES_MAX


def _is_shallow(value: object) -> bool:
    """Whether no value can lie below ``DEPTH_MAX``; quicker than ``walk``, and true of all that tools write."""
    level: list[Any] = [value]
    for _ in range(DEPTH_MAX - 1):
        parts = (part for item in level for part in (item.values() if isinstance(item, dict) else item))
        level = [part for part in parts if isinstance(part, _CONTAINERS)]
        if not level:
            return True
    return False


def _check_values(loaded: object) -> None:
    for value, depth in walk(loaded):
        if depth > DEPTH_MAX:
            _fail("it is nested too deeply")
        if what := trouble(value):
            _fail(what)


def walk(value: object) -> Iterator[tuple[object, int]]:
    """Every value and member name with its level of nesting, from 1 on; without recursion."""
    todo: list[tuple[object, int]] = [(value, 1)]
    while todo:
        item, depth = todo.pop()
        yield item, depth
        if isinstance(item, dict):
            # A name lies on the level of its object.
            todo.extend((name, depth) for name in item)
            todo.extend((part, depth + 1) for part in item.values())
        elif isinstance(item, list):
            todo.extend((part, depth + 1) for part in item)


def trouble(value: object) -> str:
    """Why json-c would not keep a scalar as it is; '' if it would."""
    if isinstance(value, str):
        if odd := _ODD.search(value):
            return "a text has a NUL" if odd[0] == "\0" else "a text has a lone surrogate"
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            return "a number does not fit into 64 bits"
    elif isinstance(value, float) and not math.isfinite(value):
        return "a number does not fit into a double"
    return ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        _fail("an object has a member twice")
    return members


def _constant(name: str) -> NoReturn:
    _fail(f"{name} is not JSON")


def _fail(what: str) -> NoReturn:
    raise FormatError(f"cannot read LUKS2 metadata: {what}")
