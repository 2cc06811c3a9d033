# SPDX-License-Identifier: GPL-2.0-or-later
"""The XML of the interfaces: complete, readable for others, the source of the manual, and what the code does.

What a live object says of itself is compared in tests/integration/test_introspection.py.
"""

import subprocess
import sys
from xml.etree import ElementTree

import pytest

from luksrotd import names
from luksrotd.bus.device import Device
from luksrotd.bus.errors import STANDARD_CODES
from luksrotd.bus.history import LIMIT, NUMBERS
from luksrotd.bus.job import Job
from luksrotd.bus.manager import Manager
from luksrotd.bus.transaction import Transaction
from luksrotd.errors import leaves
from tests.support.dbusdoc import TOOL, XML, interfaces, tool
from tests.support.testbed import PROJECT

INTERFACES = interfaces()
CODE = {
    names.MANAGER_INTERFACE: Manager,
    names.DEVICE_INTERFACE: Device,
    names.TRANSACTION_INTERFACE: Transaction,
    names.JOB_INTERFACE: Job,
}
MEMBERS = [pytest.param(one, id=f"{face.name}.{one.name}") for face in INTERFACES.values() for one in face.members]
METHODS = [
    pytest.param(face.name, one, id=f"{face.name}.{one.name}")
    for face in INTERFACES.values()
    for one in face.of("method")
]
MAN_PAGE = PROJECT / "docs" / "man" / "org.luksrotd1.5.scd"
#: Its own jobs everybody may cancel, so the method asks for those of others.
ASKS_BY_ITSELF = {(names.JOB_INTERFACE, "Cancel")}
#: By name of the argument: what describes a secret, among the members that Device's comment has for all.
SECRETS = {
    "credential": {"fd", "keyfile", "credential", "token", "pin-fd"},
    "new_secret": {"fd", "keyfile", "credential", "generate"},
}


def test_there_is_one_file_for_each_interface():
    assert set(INTERFACES) == set(names.INTERFACES)
    assert {path.stem for path in XML} == set(names.INTERFACES)


# -- complete --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_and_argument_is_described(member):
    arguments = [name for way in ("in", "out") for name, _ in member.arguments(way)]
    assert list(member.doc.parameters) == arguments
    assert all(member.doc.parameters.values())
    says_something = any(isinstance(block, str) for block in member.doc.blocks)
    assert says_something or member.doc.parameters, "nothing is said of it"
    if member.element.tag != "method":
        assert says_something


@pytest.mark.parametrize(("interface", "method"), METHODS)
def test_every_method_ends_in_options_which_are_described(interface, method):
    assert method.arguments("in")[-1] == ("options", "a{sv}")
    wanted = "See below." if method.doc.table("Options") else "None yet."
    assert method.doc.parameters["options"] == wanted


@pytest.mark.parametrize(("interface", "method"), METHODS)
def test_errors_and_actions_that_are_named_exist(interface, method):
    assert set(method.doc.errors) <= set(leaves()), "there is no such error"
    assert len(set(method.doc.errors)) == len(method.doc.errors)
    if interface != names.TRANSACTION_INTERFACE and method.name not in ("TakeKey", "ConfirmKey"):
        assert method.doc.action in names.ACTIONS


@pytest.mark.parametrize("interface", INTERFACES.values(), ids=INTERFACES)
def test_annotations_are_as_they_should_be(interface):
    element = ElementTree.parse(PROJECT / "dbus" / f"{interface.name}.xml").getroot().find("interface")
    notes = {note.get("name"): note.get("value") for note in element.findall("annotation")}
    assert notes == {"org.gtk.GDBus.Since": interface.doc.parameters["since"]}
    for method in element.iter("method"):
        marked = [note.get("name") for note in method.findall("annotation")]
        names_of = {argument.get("name") for argument in method.iter("arg")}
        passes = names_of & set(SECRETS) or any(argument.get("type") == "h" for argument in method.iter("arg"))
        assert marked == (["org.gtk.GDBus.C.UnixFD"] if passes else [])


# -- the code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INTERFACES)
def test_every_member_is_there_and_no_other(name):
    code, kinds = CODE[name], ("method", "signal", "property")
    promised = {kind: {member.name for member in INTERFACES[name].of(kind)} for kind in kinds}
    made = dict(zip(kinds, (set(code.methods), set(code.signals), set(code.properties)), strict=True))
    assert made == promised


@pytest.mark.parametrize(("interface", "method"), METHODS)
def test_the_options_are_what_is_taken(interface, method):
    exposed = CODE[interface].methods[method.name]
    assert exposed.tables["options"] == method.doc.table("Options")
    if (interface, method.name) not in ASKS_BY_ITSELF:
        assert exposed.action == method.doc.action


@pytest.mark.parametrize(("interface", "method"), METHODS)
def test_secrets_are_described_by_the_same_members_everywhere(interface, method):
    exposed, described = CODE[interface].methods[method.name], INTERFACES[names.DEVICE_INTERFACE].doc.table("")
    for argument, kind in method.arguments("in"):
        if kind == "a{sv}" and argument != "options":
            assert exposed.tables[argument] == {member: described[member] for member in SECRETS[argument]}


def test_history_gives_what_is_described():
    (method,) = [one for one in INTERFACES[names.MANAGER_INTERFACE].of("method") if one.name == "GetHistory"]
    described = method.doc.table("Entries")
    assert {name: kind for name, kind in described.items() if kind != "s"} == NUMBERS
    manual = (PROJECT / "docs" / "man" / "luksrotd.8.scd").read_text(encoding="utf-8")
    fields = described.keys() - {"time", "message", "message_id", "priority"}
    assert all(f"*LUKSROTD_{name.upper()}=*" in manual for name in fields)
    text = (PROJECT / "dbus" / f"{names.MANAGER_INTERFACE}.xml").read_text(encoding="utf-8")
    assert f"at most {LIMIT}." in text


# -- for others ------------------------------------------------------------------------------------------------


def test_gdbus_codegen_reads_every_word_of_it(tmp_path):
    argv = ["gdbus-codegen", "--generate-docbook", str(tmp_path / "doc"), *map(str, XML)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for interface in INTERFACES.values():
        docbook = ElementTree.parse(tmp_path / f"doc-{interface.name}.xml").getroot()
        text = " ".join("".join(docbook.itertext()).split())
        for member in interface.members:
            assert member.name in text
            for meaning in member.doc.parameters.values():
                assert " ".join(meaning.split()) in text, f"{member.name}: {meaning}"
            for block in member.doc.blocks:
                said = [block] if isinstance(block, str) else [item.text for item in block.items]
                assert all(" ".join(one.split()) in text for one in said), member.name


def test_the_manual_is_made_of_it():
    argv = [sys.executable, str(TOOL), *map(str, XML)]
    made = subprocess.run(argv, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(PROJECT)})
    assert made.stdout == MAN_PAGE.read_text(encoding="utf-8"), "run: make man"


def test_the_manual_has_every_member_and_every_error():
    lines = MAN_PAGE.read_text(encoding="utf-8").splitlines()
    for interface in INTERFACES.values():
        assert f"# {interface.name}" in lines
        for member in interface.members:
            assert any(line.startswith((f"*{member.name}*(", f"*{member.name}* (")) for line in lines), member.name
    for code in leaves():
        assert f"*{code}*" in lines
    assert set(tool.STANDARD_ERRORS) == STANDARD_CODES


@pytest.mark.parametrize(
    ("comment", "complaint"),
    [
        ("nothing", "begins with"),
        ("", "begins with"),
        ("Name:\n  text\n\n  Options:\n    no item\n", "not an item"),
        ("Name:\n@one: text\n\n@two: text\n", "too late"),
        ("Name:\n@one: text\n  and more\n", "one line"),
    ],
)
def test_a_comment_of_another_form_is_refused(comment, complaint):
    with pytest.raises(tool.Malformed, match=complaint):
        tool.parse(comment)


def test_what_has_no_comment_is_refused(tmp_path):
    path = tmp_path / "x.xml"
    path.write_text("<node><!-- A: x --><interface name='A'><!-- C: x --><method name='B'/></interface></node>")
    with pytest.raises(tool.Malformed, match="B is described as 'C'"):
        tool.read(path)


def test_a_comment_is_taken_apart():
    doc = tool.parse(
        """
        Name: In short.
        @one: First: argument.
        @two: Second.

        A paragraph of
        two lines.

        Options:
          a (s), b-c (a{sv}): both,
            and more.
          d (u): last.
        Action: org.luksrotd1.list
        Errors: Busy,
          UnknownDevice
        """
    )
    assert (doc.name, doc.parameters) == ("Name", {"one": "First: argument.", "two": "Second."})
    assert doc.blocks[:2] == ["In short.", "A paragraph of two lines."]
    assert doc.table("Options") == {"a": "s", "b-c": "a{sv}", "d": "u"}
    assert [item.text for item in doc.blocks[2].items] == ["both, and more.", "last."]
    assert (doc.action, doc.errors) == ("org.luksrotd1.list", ("Busy", "UnknownDevice"))
