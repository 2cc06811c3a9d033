# SPDX-License-Identifier: GPL-2.0-or-later
"""The bus policy and the polkit files, held against ``luksrotd.names``."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from luksrotd import names
from tests.bus.toy import INTERFACE, PATH, serve
from tests.support.busclient import BusClient, CallFailed, Remote

PROJECT = Path(__file__).resolve().parents[2]
INTERFACES = {names.MANAGER_INTERFACE, names.DEVICE_INTERFACE, names.JOB_INTERFACE}
STANDARD = {f"org.freedesktop.DBus.{name}" for name in ("Introspectable", "ObjectManager", "Peer", "Properties")}
DEFAULTS = {"yes", "no", "auth_self", "auth_self_keep", "auth_admin", "auth_admin_keep"}


@pytest.fixture(scope="module")
def policy():
    return ElementTree.parse(PROJECT / "polkit/org.luksrotd1.policy").getroot()


def test_every_action_of_the_code_is_in_the_policy_and_no_other(policy):
    assert [action.get("id") for action in policy.iter("action")] == list(names.ACTIONS)


def test_every_action_is_explained_and_has_known_defaults(policy):
    for action in policy.iter("action"):
        assert action.findtext("description")
        assert action.findtext("message")
        assert [item.tag for item in action.find("defaults")] == ["allow_any", "allow_inactive", "allow_active"]
        assert {item.text for item in action.find("defaults")} <= DEFAULTS


def test_messages_use_only_details_that_the_daemon_gives(policy):
    for message in policy.iter("message"):
        assert set(re.findall(r"\$\((\w+)\)", message.text)) <= {"device", "uuid", "key", "operation"}


def test_nothing_that_reveals_or_borrows_a_secret_is_remembered(policy):
    for action in (names.ACTION_GET_DATA, names.ACTION_KEYFILE):
        defaults = policy.find(f"action[@id='{action}']/defaults")
        assert {item.text for item in defaults} == {"auth_admin"}


def test_looking_is_free_and_only_that(policy):
    free = {action.get("id") for action in policy.iter("action") if action.findtext("defaults/allow_any") == "yes"}
    assert free == {names.ACTION_LIST}


def test_the_bus_policy_lets_root_own_the_name_and_everybody_call_our_interfaces():
    root, default = ElementTree.parse(PROJECT / "dbus/org.luksrotd1.conf").getroot().iter("policy")
    assert (root.get("user"), default.get("context")) == ("root", "default")
    assert [rule.get("own") for rule in root if rule.get("own")] == [names.BUS_NAME]
    assert {rule.get("send_destination") for rule in default} == {names.BUS_NAME}
    assert {rule.get("send_interface") for rule in default} == INTERFACES | STANDARD


@pytest.mark.asyncio
async def test_the_bus_enforces_it(bed):
    async with serve():
        remote = Remote(bed, bed.user("games").pw_uid)
        assert await remote.call(PATH, INTERFACE, "Echo", "s", ["x"]) == ["x"]
        with pytest.raises(CallFailed, match="AccessDenied"):
            await remote.call(PATH, "org.luksrotd1.Unheard", "Of")
        remote.close()
        async with BusClient() as root:
            with pytest.raises(CallFailed, match="UnknownInterface"):
                await root.call(PATH, "org.luksrotd1.Unheard", "Of")


@pytest.mark.asyncio
async def test_the_example_rules_load_and_do_what_they_say(bed):
    rules = (PROJECT / "polkit/org.luksrotd1.rules.example").read_text()
    mine = rules.replace('"escrow"', '"games"')
    assert mine != rules
    bed.set_rules(mine.replace('"backup"', '"back?up"'))
    async with serve():
        for user, works in (("games", True), ("nobody", False)):
            remote = Remote(bed, bed.user(user).pw_uid)
            call = remote.call(PATH, INTERFACE, "Rotate", "sa{sv}", ["k", {}])
            if works:
                assert await call == ["rotated k"]
            else:
                with pytest.raises(CallFailed):
                    await call
            remote.close()
    bed.set_rules("")
