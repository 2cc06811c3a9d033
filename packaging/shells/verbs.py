# SPDX-License-Identifier: GPL-2.0-or-later
"""The verbs of luksrotctl and their arguments, by its parser, and what the files for all shells have in common."""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from luksrotd.names import DEFAULT_KEY_NAME

HEAD = """\
# SPDX-License-Identifier: GPL-2.0-or-later
# Made by packaging/shell_completions.py from the parser of luksrotctl: do not edit."""
#: Nodes of LUKS2 volumes, one a line.  lsblk(8) asks udev, which needs no right, and opens no device for it.
VOLUMES = (
    "lsblk --noheadings --raw --paths --output NAME,FSTYPE,FSVER 2>/dev/null | sed -n 's/ crypto_LUKS 2$//p' | sort -u"
)
#: What may stand for an argument, by how help calls it; nothing is offered for what is not here.
KINDS = {"FILE": "file", "JSON|@FILE": "data", "DEVICE": "device", "COMMAND": "command"}
WORDS = {"N|any": ("any",), "NAME": (DEFAULT_KEY_NAME,)}


@dataclass(frozen=True)
class Argument:
    """An option (``names``), or an operand (no names).

    ``kind`` is what it takes: "" nothing that could be offered, "flag" nothing at all, "words" one of ``words``, or a
    value of ``KINDS``.  ``excludes`` are options that cannot stand beside it.
    """

    names: tuple[str, ...]
    kind: str
    words: tuple[str, ...]
    text: str
    many: bool = False
    excludes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verb:
    """``name`` has two words if the verb has an action."""

    name: str
    text: str
    arguments: Sequence[Argument]

    @property
    def options(self) -> list[Argument]:
        """The options."""
        return [one for one in self.arguments if one.names]

    @property
    def operands(self) -> list[Argument]:
        """The operands, in order."""
        return [one for one in self.arguments if not one.names]


def verbs_of(parser: argparse.ArgumentParser, *path: str) -> Iterator[Verb]:
    """All verbs; with the name '' what may stand before one."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not path or not nested:
        text = (parser.description or "").partition("\n")[0].rstrip(".")
        yield Verb(" ".join(path), _short(text[:1].lower() + text[1:]), list(_arguments(parser)))
    for action in nested:
        for name, verb in action.choices.items():
            yield from verbs_of(verb, *path, name)


def _arguments(parser: argparse.ArgumentParser) -> Iterator[Argument]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        words = tuple(map(str, action.choices or WORDS.get(metavar, ())))
        kind = "flag" if action.nargs == 0 else "words" if words else KINDS.get(metavar, "")
        beside = [
            name
            for group in parser._mutually_exclusive_groups
            if action in group._group_actions
            for other in group._group_actions
            if other is not action
            for name in other.option_strings
        ]
        many = action.nargs in ("*", "+")
        yield Argument(tuple(action.option_strings), kind, words, _short(action.help or ""), many, tuple(beside))


def _short(text: str) -> str:
    """What fits beside the word: up to the first clause, unless that says too little."""
    for clause in (r"; | \(|: |, or |, without", r"; | \("):
        short = re.split(clause, text, maxsplit=1)[0].strip()
        if " " in short:
            break
    return short


def group_texts(verbs: Sequence[Verb]) -> dict[str, str]:
    """The words before an action, with those that may follow."""
    found: dict[str, list[str]] = {}
    for verb in verbs:
        first, _, action = verb.name.partition(" ")
        if action:
            found.setdefault(first, []).append(action)
    return {name: " or ".join(actions) for name, actions in found.items()}


def quoted(text: str) -> str:
    """For sh and zsh."""
    return "'" + text.replace("'", "'\\''") + "'"
