# SPDX-License-Identifier: GPL-2.0-or-later
"""The bus and polkit of a real machine, as root and as an ordinary user."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from luksrotd import names
from tests.beds.container import PROJECT
from tests.beds.waiting import until
from tests.installed.container.actions import enroll, luksrotctl, main_pid, property_of
from tests.support.daemon_process import BACKUP, NEW, OLD

UNIT = "luksrotd.service"
USER = "escrow"
EXAMPLE = "/usr/share/doc/luksrotd/examples/org.luksrotd1.rules.example"
RULES = "/etc/polkit-1/rules.d/50-luksrotd.rules"


@pytest.fixture(scope="module")
def user(container):
    """An ordinary user, whose home has the keys; of the name that the example rules speak of."""
    container.run("useradd", "--create-home", USER)
    for name, secret in (("backup", BACKUP), ("new", NEW)):
        container.put(f"/home/{USER}/{name}.key", secret.decode())
    return USER


@pytest.fixture
def rules(container):
    """The example rules, installed as they say, and read, which may else take polkitd a while."""
    container.run("install", "-m", "0644", EXAMPLE, RULES)
    container.run("systemctl", "restart", "polkit.service")
    yield
    container.run("rm", RULES)
    container.run("systemctl", "restart", "polkit.service")


def busctl(container, *arguments, **options):
    """Of org.luksrotd1; the reply's body, from JSON."""
    shown = container.run("busctl", "--json=short", arguments[0], names.BUS_NAME, *arguments[1:], **options).stdout
    return json.loads(shown)["data"] if shown else None


def stage(container, volume, user):
    """What luksrotctl says to that user, who stages a key with keys of its own."""
    home = f"/home/{USER}"
    keys = (f"--key-file={home}/backup.key", f"--new-keyfile={home}/new.key")
    return container.run("luksrotctl", "stage", volume.node, *keys, user=user, check=False)


# -- who may -----------------------------------------------------------------------------------------------------------


def test_polkit_knows_every_action(container):
    shown = container.run("pkaction").stdout.split()
    assert [action for action in shown if action.startswith(names.BUS_NAME)] == sorted(names.ACTIONS)


def test_root_may(container, volume):
    enroll(container, volume)
    assert [volume.opens(secret) for secret in (OLD, BACKUP)] == [True, True]


def test_a_user_may_not_without_a_rule(container, volume, user):
    enroll(container, volume)
    before = volume.headers()
    refused = stage(container, volume, user)
    assert refused.returncode == 5
    arguments = (names.BUS_NAME, volume.path, names.DEVICE_INTERFACE, "Finish", "sa{sv}", "backup", "0")
    refused = container.run("busctl", "call", *arguments, user=user, check=False)
    assert "not allowed by polkit" in refused.stderr
    assert volume.headers() == before
    uid = container.run("id", "-u", user).stdout.strip()
    container.run("journalctl", "--sync")
    explained = container.run("journalctl", "-x", f"MESSAGE_ID={names.MessageId.DENIED}").stdout
    assert f"User {uid} was refused" in explained


def test_a_user_may_what_the_example_rules_allow_and_no_more(container, volume, user, rules):
    enroll(container, volume)
    until(lambda: stage(container, volume, user).returncode == 0, "polkitd has read the rules")
    assert luksrotctl(container, "finish", volume.node, user=user) is not None
    assert [volume.opens(secret) for secret in (OLD, BACKUP, NEW)] == [True, False, True]
    arguments = (f"--key-file=/home/{USER}/new.key", f"--new-keyfile=/home/{USER}/backup.key")
    refused = container.run("luksrotctl", "rotate", volume.node, *arguments, user=user, check=False)
    assert refused.returncode == 5
    assert stage(container, volume, "games").returncode not in (0, 6)


def test_a_user_may_not_be_the_daemon(container, user):
    """The bus policy: nobody but root has the name, nor sends what is not in the API."""
    script = f"""if True:
        import asyncio
        from dbus_next import BusType
        from dbus_next.aio import MessageBus
        async def main():
            bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
            print(await bus.request_name("{names.BUS_NAME}"))
        asyncio.run(main())"""
    refused = container.run("/usr/bin/python3", "-c", script, user=user, check=False)
    assert refused.returncode
    assert "is not allowed to own" in refused.stderr


# -- what is there -----------------------------------------------------------------------------------------------------


def members(node):
    """Interface → names of its methods, properties and signals, of what introspection shows of our own interfaces."""
    return {
        interface.get("name"): {(member.tag, member.get("name")) for member in interface if member.tag != "annotation"}
        for interface in node.iter("interface")
        if interface.get("name").startswith(names.BUS_NAME)
    }


def test_introspection_shows_what_the_installed_interfaces_say(container, volume, user):
    for interface, path in (("Manager", names.ROOT_PATH), ("Device", volume.path)):
        arguments = (path, "org.freedesktop.DBus.Introspectable", "Introspect")
        (shown,) = busctl(container, "call", *arguments, user=user)
        file = f"/usr/share/dbus-1/interfaces/{names.BUS_NAME}.{interface}.xml"
        said = members(ElementTree.fromstring(container.run("cat", file).stdout))
        assert members(ElementTree.fromstring(shown)) == said


def test_the_object_manager_lists_the_volume(container, volume):
    (objects,) = busctl(container, "call", names.ROOT_PATH, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
    assert objects[volume.path][names.DEVICE_INTERFACE]["Node"]["data"] == volume.node


def test_installed_interfaces_are_those_of_the_source(container):
    for path in sorted((PROJECT / "dbus").glob("*.xml")):
        assert container.run("cat", f"/usr/share/dbus-1/interfaces/{path.name}").stdout == path.read_text()


# -- activation --------------------------------------------------------------------------------------------------------


def test_a_call_starts_the_service_through_systemd(container, volume, user):
    container.run("systemctl", "stop", UNIT)
    assert main_pid(container) == 0
    paths = busctl(container, "call", names.ROOT_PATH, names.MANAGER_INTERFACE, "GetDevice", "sa{sv}", volume.node, "0")
    assert paths == [volume.path]
    pid = main_pid(container)
    assert pid
    assert container.run("cat", f"/proc/{pid}/cgroup").stdout.rstrip().endswith(f"/system.slice/{UNIT}")
    status = container.run("busctl", "status", names.BUS_NAME).stdout
    assert re.search(rf"^PID={pid}$", status, re.MULTILINE)
    assert property_of(container, names.ROOT_PATH, names.MANAGER_INTERFACE, "Version")


def test_files_of_bus_and_polkit_are_where_debian_expects_them(container):
    for source, target in (
        ("dbus/org.luksrotd1.conf", "/usr/share/dbus-1/system.d/org.luksrotd1.conf"),
        ("dbus/org.luksrotd1.service", "/usr/share/dbus-1/system-services/org.luksrotd1.service"),
        ("polkit/org.luksrotd1.policy", "/usr/share/polkit-1/actions/org.luksrotd1.policy"),
        ("polkit/org.luksrotd1.rules.example", EXAMPLE),
    ):
        assert container.run("cat", target).stdout == Path(PROJECT, source).read_text(), target
        owner = container.run("stat", "--format=%U %a", target).stdout
        assert owner == "root 644\n", target
