# SPDX-License-Identifier: GPL-2.0-or-later
"""What a change does to a volume, object by object, in words."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from luksrotd.ctl.model import Difference

_DONE: Final[Mapping[str, str]] = {
    "add": "added",
    "change": "changed",
    "remove": "removed",
    "replace": "replaced",
    "wipe": "overwritten",
    "rewrite": "rewritten",
}


def new_generation(differences: Iterable[Difference], name: str) -> int:
    """The generation that the newest key ``name`` will have; raises ``ValueError`` where none comes."""
    tokens = (one.after for one in differences if one.what == "token" and one.after.get("name") == name)
    return max(int(token["generation"]) for token in tokens)


def lines(differences: Iterable[Difference]) -> Iterator[str]:
    """One line for each of them."""
    for one in differences:
        done = _DONE.get(one.how, one.how)
        if one.what == "area":
            yield f"{one.before.get('size')} bytes at {one.name} {done}"
        elif one.what == "header":
            other = "secondary" if one.name == "primary" else "primary"
            yield f"{one.name} header {done} from the {other} one"
        elif one.how == "change":
            members = sorted(
                member
                for member in one.before.keys() | one.after.keys()
                if one.before.get(member) != one.after.get(member)
            )
            told = ", ".join(_member(member, one.before, one.after) for member in members)
            yield f"{one.what} {one.name} {done}: {told}"
        else:
            yield f"{one.what} {one.name} {done}{_summary(one.after or one.before)}"


def _member(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if name not in after:
        return f"{name} dropped"
    written = json.dumps(after[name], ensure_ascii=False)
    return f"{name} {written} added" if name not in before else f"{name} now {written}"


def _summary(content: Mapping[str, Any]) -> str:
    """What an object is, in a few words."""
    told = [str(content[member]) for member in ("type", "name", "pbkdf") if content.get(member)]
    if "generation" in content:
        told.append(f"generation {content['generation']}")
    if content.get("keyslots"):
        told.append(f"keyslot {', '.join(map(str, content['keyslots']))}")
    if "size" in content:
        told.append(f"{content['size']} bytes at {content.get('offset')}")
    return f" ({', '.join(told)})" if told else ""
