# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes org.luksrotd1(5) out of dbus/*.xml: ``python3 packaging/dbus_doc.py dbus/*.xml >docs/man/org.luksrotd1.5.scd``.

A comment right before an interface or member describes it, in the form of gdbus-codegen(1)::

    Name: what it is, if one line is enough
    @argument: one line, however long
    @since: 0.1

    Paragraphs.

    Options:
      name (type), other (type): what it means, and
        more lines of that.
    Action: org.luksrotd1.verb
    Errors: UnknownDevice, Busy

Whatever ends in a colon and has such items under it is a table; Options, Action and Errors mean more to the tests.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from luksrotd.errors import LuksrotdError, leaves

INDENT = 2
EMITS_CHANGED = "org.freedesktop.DBus.Property.EmitsChangedSignal"
STANDARD_ERRORS = ("InvalidArgs", "InteractiveAuthorizationRequired", "LimitsExceeded")

_FIRST = re.compile(r"(?P<name>[\w.]+):(?: (?P<text>.*))?")
_PARAMETER = re.compile(r"@(?P<name>\w+): (?P<text>.*)")
_TERM = r"[\w-]+ \([a-z{}()]+\)"
_ITEM = re.compile(rf"(?P<terms>{_TERM}(?:, {_TERM})*): (?P<text>.*)")
_ONE_TERM = re.compile(r"(?P<name>[\w-]+) \((?P<type>[^ ]+)\)")


class Malformed(Exception):
    """A comment is not in that form."""


@dataclass(frozen=True)
class Item:
    """A line of a table: names with their D-Bus types, and what they mean."""

    terms: tuple[tuple[str, str], ...]
    text: str


@dataclass
class Table:
    """Items under a title, '' if they follow a paragraph."""

    title: str
    items: list[Item] = field(default_factory=list)


@dataclass
class Doc:
    """A comment; ``blocks`` are its paragraphs and tables in their order."""

    name: str
    parameters: dict[str, str] = field(default_factory=dict)
    blocks: list[str | Table] = field(default_factory=list)
    action: str = ""
    errors: tuple[str, ...] = ()

    def table(self, title: str) -> dict[str, str]:
        """Types by name, of the table with that title."""
        found = [block for block in self.blocks if isinstance(block, Table) and block.title == title]
        return {name: kind for table in found for item in table.items for name, kind in item.terms}


@dataclass(frozen=True)
class Member:
    """A method, signal or property, and its comment."""

    element: ElementTree.Element
    doc: Doc

    @property
    def name(self) -> str:
        """Its name."""
        return self.element.get("name", "")

    def arguments(self, direction: str) -> list[tuple[str, str]]:
        """Names and types; of a signal all are ``out``."""
        default = "in" if self.element.tag == "method" else "out"
        found = [item for item in self.element.findall("arg") if item.get("direction", default) == direction]
        return [(item.get("name", ""), item.get("type", "")) for item in found]


@dataclass(frozen=True)
class Interface:
    """An interface with all that is in it."""

    name: str
    doc: Doc
    members: tuple[Member, ...]

    def of(self, kind: str) -> list[Member]:
        """Its ``method``, ``signal`` or ``property`` members."""
        return [member for member in self.members if member.element.tag == kind]


def read(path: Path) -> list[Interface]:
    """The interfaces in a file; raises ``Malformed`` for what has no comment, or a bad one."""
    builder = ElementTree.TreeBuilder(insert_comments=True)
    parser = ElementTree.XMLParser(target=builder)  # noqa: S314 -- these are our own files
    root = ElementTree.parse(path, parser).getroot()  # noqa: S314 -- as above
    return [Interface(element.get("name", ""), doc, tuple(_members(element))) for element, doc in _documented(root)]


def _members(interface: ElementTree.Element) -> Iterator[Member]:
    return (Member(element, doc) for element, doc in _documented(interface))


def _documented(parent: ElementTree.Element) -> Iterator[tuple[ElementTree.Element, Doc]]:
    comment = ""
    for child in parent:
        tag: object = child.tag  # not always a text, whatever typeshed says
        if tag is ElementTree.Comment:
            comment = child.text or ""
        elif child.tag != "annotation":
            doc = parse(comment)
            if doc.name != child.get("name"):
                raise Malformed(f"{child.get('name')} is described as {doc.name!r}")
            yield child, doc
            comment = ""


def parse(comment: str) -> Doc:
    """The comment, taken apart."""
    lines = [line.rstrip() for line in comment.strip("\n").expandtabs().split("\n")]
    margin = min((len(line) - len(line.lstrip()) for line in lines if line), default=0)
    lines = [line[margin:] for line in lines]
    first = _FIRST.fullmatch(lines[0].strip()) if lines else None
    if first is None:
        raise Malformed(f"a comment begins with {lines[:1]}")
    doc = Doc(first["name"])
    if first["text"]:
        doc.blocks.append(first["text"])
    at = 1
    while at < len(lines) and (parameter := _PARAMETER.fullmatch(lines[at])):
        doc.parameters[parameter["name"]] = parameter["text"]
        at += 1
    if doc.parameters and at < len(lines) and lines[at]:
        raise Malformed(f"{doc.name} says more than one line of an argument, which gdbus-codegen would lose")
    _read_body(doc, lines[at:])
    return doc


def _read_body(doc: Doc, lines: Sequence[str]) -> None:
    paragraph: list[str] = []
    for line in (*_joined(lines), ""):
        title = re.fullmatch(r"(\w+):", line)
        if line.startswith("Action: "):
            doc.action = line.removeprefix("Action: ")
        elif line.startswith("Errors: "):
            doc.errors = tuple(line.removeprefix("Errors: ").split(", "))
        elif line.startswith("  "):
            item = _item(line.strip())
            if paragraph:
                doc.blocks.append(" ".join(paragraph))
                paragraph = []
            if not doc.blocks or not isinstance(doc.blocks[-1], Table):
                doc.blocks.append(Table(""))
            table = doc.blocks[-1]
            assert isinstance(table, Table)  # noqa: S101 -- for mypy
            table.items.append(item)
        elif title:
            doc.blocks.append(Table(title[1]))
        elif line:
            paragraph.append(line)
        elif paragraph:
            doc.blocks.append(" ".join(paragraph))
            paragraph = []
    if any(line.startswith("@") for line in lines):
        raise Malformed(f"{doc.name} describes an argument too late")


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Lines with what continues them: what is further in than an item, or than Action and Errors."""
    whole = ""
    for line in lines:
        deep = len(line) - len(line.lstrip())
        continues = deep >= 2 * INDENT or (deep == INDENT and whole.startswith(("Action:", "Errors:")))
        if line and whole and continues:
            whole += " " + line.strip()
            continue
        if whole:
            yield whole
        whole = line
        if not line:
            yield ""
    yield whole


def _item(line: str) -> Item:
    found = _ITEM.fullmatch(line)
    if found is None:
        raise Malformed(f"not an item: {line}")
    return Item(tuple((term["name"], term["type"]) for term in _ONE_TERM.finditer(found["terms"])), found["text"])


# -- scdoc(5) ----------------------------------------------------------------------------------------------------

HEAD = """org.luksrotd1(5)

; SPDX-License-Identifier: GPL-2.0-or-later
; Made by packaging/dbus_doc.py from dbus/*.xml and luksrotd/errors.py: do not edit.

# NAME

org.luksrotd1 - D-Bus interface of luksrotd

# DESCRIPTION

*luksrotd*(8) serves these interfaces on the system bus, under the name _org.luksrotd1_. The same is in the XML files in
_/usr/share/dbus-1/interfaces_, which *gdbus-codegen*(1) reads. Behind the name of each option, and of each member of a
dictionary, is its D-Bus type.
"""
TAIL = """
# SEE ALSO

*luksrotd*(8), *luksrotctl*(1), *luksrotd.conf*(5), *luksrotd-token*(7), *busctl*(1), *gdbus*(1), *polkit*(8)
"""
HEADINGS = {"method": "Methods", "signal": "Signals", "property": "Properties"}
#: What a property tells when it changes, beside its value.
CHANGES = {"const": "never changes", "invalidates": "announced without its value", "false": "not announced"}


def page(interfaces: Iterable[Interface]) -> str:
    """The manual page."""
    return HEAD + "".join(_interface(interface) for interface in interfaces) + _errors() + TAIL


def _interface(interface: Interface) -> str:
    text = f"\n# {interface.name}\n\n"
    text += f"{_escaped(interface.doc.parameters['short_description'])}. Since version "
    text += f"{interface.doc.parameters['since']}.\n"
    text += _blocks(interface.doc.blocks)
    for kind, heading in HEADINGS.items():
        members = interface.of(kind)
        if members:
            text += f"\n## {heading} of {interface.name}\n" + "".join(_member(member) for member in members)
    return text


def _member(member: Member) -> str:
    if member.element.tag == "property":
        noted = {note.get("name"): note.get("value", "") for note in member.element.findall("annotation")}
        changes = CHANGES.get(noted.get(EMITS_CHANGED, "true"), "")
        text = f"\n*{member.name}* ({member.element.get('type')})" + (f", {changes}" if changes else "") + "\n"
        return text + _blocks(member.doc.blocks, "\t")
    taken, given = (", ".join(f"{kind} {name}" for name, kind in member.arguments(way)) for way in ("in", "out"))
    signature = f"*{member.name}*({_escaped(taken)})" if member.element.tag == "method" else f"*{member.name}*"
    if given:
        signature += f" → ({_escaped(given)})" if member.element.tag == "method" else f"({_escaped(given)})"
    text = f"\n{signature}\n" + _blocks(member.doc.blocks, "\t", arguments=member.doc.parameters)
    if member.doc.action:
        text += f"\n\tpolkit action: _{_escaped(member.doc.action)}_\n"
    if member.doc.errors:
        text += f"\n\tErrors: {', '.join(member.doc.errors)}\n"
    return text


def _blocks(blocks: Sequence[str | Table], indent: str = "", *, arguments: dict[str, str] | None = None) -> str:
    """Paragraphs first, so that what a member does comes before its arguments, then its tables."""
    first = next((at for at, block in enumerate(blocks) if isinstance(block, Table)), len(blocks))
    text = "".join(_paragraph(block, indent) for block in blocks[:first] if isinstance(block, str))
    for name, meaning in (arguments or {}).items():
        text += f"\n{indent}_{_escaped(name)}_: {_escaped(meaning)}\n"
    for block in blocks[first:]:
        text += _paragraph(block, indent) if isinstance(block, str) else _table(block, indent)
    return text


def _paragraph(text: str, indent: str) -> str:
    return f"\n{indent}{_escaped(text)}\n"


def _table(table: Table, indent: str) -> str:
    text = f"\n{indent}{table.title}:\n" if table.title else "\n"
    for item in table.items:
        terms = ", ".join(f"*{_escaped(name)}* ({_escaped(kind)})" for name, kind in item.terms)
        text += f"{indent}- {terms}: {_escaped(item.text)}\n"
    return text


def _errors() -> str:
    text = "\n# ERRORS\n\nNames are _org.luksrotd1.Error_ and these"
    text += ", but of those that every client knows: _org.freedesktop.DBus.Error_ and "
    text += ", ".join(f"*{code}*" for code in STANDARD_ERRORS) + ".\n"
    for code, error in sorted(leaves().items()):
        text += f"\n*{code}*\n\t{_escaped(_summary(error))}\n"
    return text


def _summary(error: type[LuksrotdError]) -> str:
    return " ".join((error.__doc__ or "").split())


def _escaped(text: str) -> str:
    return re.sub(r"([\\*_#`~|<>\[\]])", r"\\\1", text)


def main(paths: Sequence[str]) -> None:
    """Write the page of these files, Manager first, to standard output."""
    interfaces = [interface for path in paths for interface in read(Path(path))]
    order = ("Manager", "Device", "Transaction", "Job")
    interfaces.sort(key=lambda interface: order.index(interface.name.rpartition(".")[2]))
    sys.stdout.write(page(interfaces))


if __name__ == "__main__":
    main(sys.argv[1:])
