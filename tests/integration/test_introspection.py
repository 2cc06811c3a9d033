# SPDX-License-Identifier: GPL-2.0-or-later
"""What the live objects say of themselves, held against the XML, with annotations."""

import subprocess
from xml.etree import ElementTree

import pytest
from dbus_next.signature import Variant

from luksrotd import __version__, names
from tests.support.daemon_process import ended, start
from tests.support.testbed import PROJECT

pytestmark = pytest.mark.asyncio
EMITS_CHANGED = "org.freedesktop.DBus.Property.EmitsChangedSignal"


def notes(element):
    return tuple(sorted((note.get("name"), note.get("value")) for note in element.findall("annotation")))


def described(interface):
    """All that the XML of an interface promises, a line for each, so that a difference names what is missing."""
    lines = {("interface", interface.get("name"), *notes(interface))}
    for member in interface:
        here = member.tag, member.get("name")
        if member.tag in ("method", "signal"):
            default = "in" if member.tag == "method" else "out"
            lines.add((*here, *notes(member)))
            lines |= {
                (*here, at, one.get("name"), one.get("type"), one.get("direction", default), notes(one))
                for at, one in enumerate(member.findall("arg"))
            }
        elif member.tag == "property":
            noted = {EMITS_CHANGED: "true"} | dict(notes(member))  # as the specification has it for none
            lines.add((*here, member.get("type"), member.get("access"), *sorted(noted.items())))
    return lines


def compare(text, name):
    """The interface in introspection data is the one in its file."""
    live = {one.get("name"): one for one in ElementTree.fromstring(text).findall("interface")}
    assert name in live
    source = ElementTree.parse(PROJECT / "dbus" / f"{name}.xml").getroot().find("interface")
    promised, shown = described(source), described(live[name])
    assert (promised - shown, shown - promised) == (set(), set()), "missing, too much"
    return live


async def introspect(client, path):
    (text,) = await client.call(path, "org.freedesktop.DBus.Introspectable", "Introspect")
    return text


async def test_introspection_is_what_the_xml_says(enrolled, client):
    job = await start(client, enrolled.path)
    begin = [{"timeout": Variant("t", 60_000_000)}]
    assert (await ended(client, job))["State"] == "finished"
    (transaction,) = await client.call(enrolled.path, names.DEVICE_INTERFACE, "BeginTransaction", "a{sv}", begin)
    for path, name in (
        (names.ROOT_PATH, names.MANAGER_INTERFACE),
        (enrolled.path, names.DEVICE_INTERFACE),
        (transaction, names.TRANSACTION_INTERFACE),
        (job, names.JOB_INTERFACE),
    ):
        live = compare(await introspect(client, path), name)
        assert ("org.freedesktop.DBus.ObjectManager" in live) == (path == names.ROOT_PATH)
        assert set(live) >= {f"org.freedesktop.DBus.{one}" for one in ("Introspectable", "Peer", "Properties")}
    assert await client.get(names.ROOT_PATH, names.MANAGER_INTERFACE, "Version") == __version__


async def test_glib_makes_a_proxy_of_what_the_live_objects_say(enrolled, client, tmp_path):
    """Types and annotations are read by another implementation, not only compared."""
    job = await start(client, enrolled.path)
    assert (await ended(client, job))["State"] == "finished"
    for path, name in ((enrolled.path, names.DEVICE_INTERFACE), (job, names.JOB_INTERFACE)):
        (tmp_path / f"{name}.xml").write_text(await introspect(client, path))
        argv = ["gdbus-codegen", "--generate-c-code", name, f"{name}.xml"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path)  # noqa: ASYNC221 -- short
        assert (done.returncode, done.stderr) == (0, "")
    of = {one: (tmp_path / f"{one}.c").read_text() for one in (names.JOB_INTERFACE, names.DEVICE_INTERFACE)}
    assert "GUnixFDList **out_fd_list" in of[names.JOB_INTERFACE]
    assert "GUnixFDList  *fd_list" in of[names.DEVICE_INTERFACE]  # of Rotate, whose signature does not show it


async def test_a_difference_would_be_seen(enrolled, client):
    text = await introspect(client, enrolled.path)
    for old, new in (
        ('name="Rotate"', 'name="Turn"'),
        ('value="const"', 'value="true"'),
        ('type="t"', 'type="u"'),
        (f'<annotation name="{EMITS_CHANGED}" value="const" />', ""),
        ('value="0.1"', 'value="0.2"'),
        ('name="new_secret"', 'name="secret"'),
    ):
        assert old in text
        with pytest.raises(AssertionError):
            compare(text.replace(old, new, 1), names.DEVICE_INTERFACE)
