# SPDX-License-Identifier: GPL-2.0-or-later
"""The bus policy and the polkit files, held against ``luksrotd.names``."""

import asyncio
import re
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import pytest
import pytest_asyncio
from dbus_next.message import Message
from dbus_next.signature import Variant

from luksrotd import names
from luksrotd.bus.authority import AUTHORITY, AUTHORITY_PATH, POLKIT
from luksrotd.bus.connection import Bus
from luksrotd.bus.values import body_of
from tests.bus.toy import INTERFACE, PATH, serve
from tests.support.busclient import BusClient, CallFailed, Remote

PROJECT = Path(__file__).resolve().parents[2]
INTERFACES = set(names.INTERFACES)
STANDARD = {f"org.freedesktop.DBus.{name}" for name in ("Introspectable", "ObjectManager", "Peer", "Properties")}
#: What a default can be, the mildest first.
STRICTNESS = ["yes", "auth_self_keep", "auth_self", "auth_admin_keep", "auth_admin", "no"]
LANGUAGES = {"", "de", "fr", "es", "cs"}
QUOTES = {"": ("“", "”"), "de": ("„", "“"), "fr": ("«\u00a0", "\u00a0»"), "es": ("«", "»"), "cs": ("„", "“")}
#: Where a question is not about one volume and one key.
KNOWN_DETAILS = {
    names.ACTION_LIST: set(),
    names.ACTION_HISTORY: set(),
    names.ACTION_RECONCILE: set(),
    names.ACTION_CANCEL: {"uuid"},
    names.ACTION_TRANSACTION: {"device", "uuid"},
    names.system_action(names.ACTION_TRANSACTION): {"device", "uuid"},
    names.ACTION_SCRUB: {"device", "uuid"},
    names.system_action(names.ACTION_SCRUB): {"device", "uuid"},
    names.ACTION_KEYFILE: {"device", "uuid"},
    names.ACTION_CREDENTIAL: {"device", "uuid"},
    names.ACTION_TOKEN: {"device", "uuid"},
    names.ACTION_GENERATE: {"device", "uuid"},
}


@pytest.fixture(scope="module")
def policy():
    return ElementTree.parse(PROJECT / "polkit/org.luksrotd1.policy").getroot()


def test_every_action_of_the_code_is_in_the_policy_and_no_other(policy):
    assert [action.get("id") for action in policy.iter("action")] == list(names.ACTIONS)


def texts(action, tag):
    """Of a description or message its text by language; '' for English."""
    return {item.get("{http://www.w3.org/XML/1998/namespace}lang", ""): item.text for item in action.findall(tag)}


def details_of(text):
    return set(re.findall(r"\$\((\w+)\)", text))


def defaults(policy, action):
    return [item.text for item in policy.find(f"action[@id='{action}']/defaults")]


def test_every_action_is_explained_and_has_known_defaults(policy):
    for action in policy.iter("action"):
        assert [item.tag for item in action.find("defaults")] == ["allow_any", "allow_inactive", "allow_active"]
        assert set(defaults(policy, action.get("id"))) <= set(STRICTNESS)
        for tag in ("description", "message"):
            assert set(texts(action, tag)) == LANGUAGES, (action.get("id"), tag)
            assert len(action.findall(tag)) == len(LANGUAGES)


@pytest.mark.parametrize("tag", ["description", "message"])
def test_no_two_actions_are_explained_alike(policy, tag):
    for language in LANGUAGES:
        found = [texts(action, tag)[language] for action in policy.iter("action")]
        assert len(found) == len(set(found)), language


def test_messages_use_the_details_that_the_daemon_gives_and_in_all_languages_the_same(policy):
    for action in policy.iter("action"):
        messages = texts(action, "message")
        used = details_of(messages[""])
        assert used <= KNOWN_DETAILS.get(action.get("id"), {"device", "uuid", "key", "operation"})
        assert {language for language, text in messages.items() if details_of(text) != used} == set(), action.get("id")
        assert not any(details_of(text) for text in texts(action, "description").values())


def test_texts_are_set_as_their_languages_are(policy):
    for action in policy.iter("action"):
        for text in [*texts(action, "description").items(), *texts(action, "message").items()]:
            language, words = text
            assert not re.search(r"[\"']|\.$|  |\s$|^\s", words), text
            quoted = re.findall(r"(\S\s?)\$\(key\)(\s?\S)", words)
            assert set(quoted) <= {QUOTES[language]}, text
            assert words == unicodedata.normalize("NFC", words)


def test_no_action_implies_another(policy):
    assert list(policy.iter("annotate")) == []


def test_volumes_of_the_system_are_never_less_protected(policy):
    for action in names.VOLUME_ACTIONS:
        strict = defaults(policy, names.system_action(action))
        assert strict == ["auth_admin"] * 3, action
        pairs = list(zip(strict, defaults(policy, action), strict=True))
        assert all(STRICTNESS.index(system) >= STRICTNESS.index(plain) for system, plain in pairs), action


def test_without_a_session_one_is_trusted_no_more_than_with_one(policy):
    for action in names.ACTIONS:
        ranks = [STRICTNESS.index(default) for default in defaults(policy, action)]
        assert ranks == sorted(ranks, reverse=True), action


def test_nothing_that_reveals_or_borrows_a_secret_or_takes_a_way_in_is_remembered(policy):
    for action in (
        names.ACTION_GET_DATA,
        names.ACTION_GENERATE,
        names.ACTION_KEYFILE,
        names.ACTION_CREDENTIAL,
        names.ACTION_TOKEN,
        names.ACTION_REMOVE,
        names.ACTION_TRANSACTION,
    ):
        assert set(defaults(policy, action)) == {"auth_admin"}, action


def test_history_is_for_administrators_who_are_asked_once(policy):
    assert set(defaults(policy, names.ACTION_HISTORY)) == {"auth_admin_keep"}


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


# -- the example rules -------------------------------------------------------------------------------------------


ESCROW, HELPDESK, WHEEL = "games", "man", "lp"
"""Users that every Debian has, each alone in a group of its name."""


@pytest.fixture
def example(bed):
    """The file as it is, but for the names of its user and its groups."""
    rules = (PROJECT / "polkit/org.luksrotd1.rules.example").read_text()
    for name, mine in (("escrow", ESCROW), ("helpdesk", HELPDESK), ("wheel", WHEEL)):
        assert f'"{name}"' in rules
        rules = rules.replace(f'"{name}"', f'"{mine}"')
    yield rules
    bed.set_rules("")


class Decisions:
    """What polkit decides about a user without a person: ``yes``, ``no``, ``asks`` or (and keeps it) ``asks once``."""

    def __init__(self, bed, bus):
        self._bed = bed
        self._bus = bus
        self._users = {}

    async def about(self, user, action, **details):
        if user not in self._users:
            remote = Remote(self._bed, self._bed.user(user).pw_uid)
            self._users[user] = remote, (await remote.call(PATH, INTERFACE, "WhoAmI"))[0]
        subject = ["system-bus-name", {"name": Variant("s", self._users[user][1])}]
        body = [subject, action, details, 0, ""]
        message = Message(
            destination=POLKIT,
            path=AUTHORITY_PATH,
            interface=AUTHORITY,
            member="CheckAuthorization",
            signature="(sa{sv})sa{ss}us",
            body=body,
        )
        ((authorized, challenge, more),) = body_of(await self._bus.call(message))
        if authorized:
            return "yes"
        return "asks once" if "polkit.retains_authorization_after_challenge" in more else "asks" if challenge else "no"

    def close(self):
        for remote, _ in self._users.values():
            remote.close()


@pytest_asyncio.fixture
async def decisions(bed):
    async with serve() as service:
        decisions = Decisions(bed, service.bus)
        yield decisions
        decisions.close()


def both(action):
    """The action, for a removable volume and for one of the system."""
    return action, names.system_action(action)


@pytest.mark.asyncio
async def test_an_example_rule_lets_an_escrow_agent_rotate_in_two_steps(bed, example, decisions):
    bed.set_rules(example)
    for verb in (names.ACTION_STAGE, names.ACTION_FINISH, names.ACTION_ABORT, names.ACTION_VERIFY):
        for action in both(verb):
            assert await decisions.about(ESCROW, action, key="backup") == "yes", action
            assert await decisions.about(ESCROW, action, key="other") != "yes", action
            assert await decisions.about("nobody", action, key="backup") != "yes", action
    mine = {
        *both(names.ACTION_STAGE),
        *both(names.ACTION_FINISH),
        *both(names.ACTION_ABORT),
        *both(names.ACTION_VERIFY),
    }
    for action in set(names.ACTIONS) - mine - {names.ACTION_LIST}:
        assert (await decisions.about(ESCROW, action, key="backup")).startswith("asks"), action


@pytest.mark.asyncio
async def test_an_example_rule_lets_the_helpdesk_verify_by_their_own_password(bed, example, decisions):
    bed.set_rules(example)
    for action in both(names.ACTION_VERIFY):
        assert await decisions.about(HELPDESK, action, key="backup") == "asks once", action
    assert await decisions.about("nobody", names.system_action(names.ACTION_VERIFY), key="backup") == "asks"
    assert await decisions.about(HELPDESK, names.ACTION_GET_DATA, key="backup") == "asks"


@pytest.mark.asyncio
async def test_an_example_rule_frees_wheel_on_removable_volumes(bed, example, decisions):
    bed.set_rules(example)
    assert await decisions.about(WHEEL, names.ACTION_ROTATE) == "asks"  # who is logged in from elsewhere
    seated = example.replace("subject.local && subject.active", "true")  # there is no logind here
    assert seated != example
    bed.set_rules(seated)
    for verb in (
        names.ACTION_ENROLL,
        names.ACTION_ROTATE,
        names.ACTION_STAGE,
        names.ACTION_FINISH,
        names.ACTION_ABORT,
        names.ACTION_SET_DATA,
        names.ACTION_VERIFY,
    ):
        assert await decisions.about(WHEEL, verb) == "yes", verb
        assert await decisions.about("nobody", verb) != "yes", verb
        assert await decisions.about(WHEEL, names.system_action(verb)) == "asks", verb
    for verb in (names.ACTION_REMOVE, names.ACTION_GET_DATA, names.ACTION_KEYFILE, names.ACTION_TRANSACTION):
        assert await decisions.about(WHEEL, verb) == "asks", verb


# -- what polkit makes of the policy -----------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("locale", ["C", "de_DE.UTF-8", "fr_FR.UTF-8", "es", "cs_CZ"])
async def test_polkit_knows_every_action_in_every_language(bed, policy, locale):
    bus = await Bus().connect()
    message = Message(
        destination=POLKIT,
        path=AUTHORITY_PATH,
        interface=AUTHORITY,
        member="EnumerateActions",
        signature="s",
        body=[locale],
    )
    (known,) = body_of(await bus.call(message))
    await bus.close()
    language = "" if locale == "C" else locale[:2]
    ours = {item[0]: (item[1], item[2]) for item in known if item[0].startswith(names.BUS_NAME + ".")}
    assert ours == {
        action.get("id"): (texts(action, "description")[language], texts(action, "message")[language])
        for action in policy.iter("action")
    }


@pytest.mark.asyncio
async def test_a_person_is_asked_in_their_language_with_the_details_filled_in(bed):
    async with serve():
        remote = Remote(bed, bed.user("games").pw_uid)
        agent = await asyncio.to_thread(bed.agent, "yes", remote.pid, remote.uid, locale="cs_CZ.UTF-8")
        await remote.call(PATH, INTERFACE, "Rotate", "sa{sv}", ["k", {}], interactive=True)
        asked = await asyncio.to_thread(agent.wait_for, "begin")
        message = "Pro výměnu záložního klíče „back?up“ šifrovaného svazku /dev/toy je vyžadováno ověření"
        assert asked["message"] == message
        remote.close()
        bed.end(agent.process)
