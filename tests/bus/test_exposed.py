# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``@exposed``, ``readable`` and ``emitted`` make of an interface."""

import asyncio
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from dbus_next.signature import Variant

from luksrotd import names
from luksrotd.bus.exposed import UNPRIVILEGED, exposed
from luksrotd.bus.guard import Question
from luksrotd.bus.interface import Emits, Interface, emitted, readable
from tests.bus.toy import INTERFACE, PATH, SECRET, serve
from tests.support.busclient import BusClient, CallFailed

INVALID = "org.freedesktop.DBus.Error.InvalidArgs"


async def coroutine(self, caller, key, options): ...


async def nothing(self, caller): ...


def plain(self, caller): ...


@pytest.mark.parametrize(
    ("handler", "signatures", "more"),
    [
        (nothing, ("", ""), {"action": ""}),
        (nothing, ("", ""), {"action": "org.luksrotd1.no-such-verb"}),
        (nothing, ("", ""), {"action": UNPRIVILEGED}),
        (plain, ("", ""), {"action": names.ACTION_LIST}),
        (nothing, ("s", ""), {"action": names.ACTION_LIST}),
        (nothing, ("", "s"), {"action": names.ACTION_LIST}),
        (nothing, ("", ""), {"action": names.ACTION_LIST, "options": {"x": "s"}}),
        (coroutine, ("sa{sv}", ""), {"action": names.ACTION_LIST, "dictionaries": {"key": {}}}),
        (coroutine, ("sa{sv}", ""), {"action": names.ACTION_LIST, "dictionaries": {"other": {}}}),
    ],
)
def test_a_method_that_is_not_wholly_described_cannot_be_defined(handler, signatures, more):
    with pytest.raises(TypeError):
        exposed(*signatures, **more)(handler)


def test_a_method_without_an_action_cannot_be_defined():
    with pytest.raises(TypeError, match="action"):
        exposed("", "")


def test_members_must_fit_their_signatures():
    with pytest.raises(TypeError):
        readable("ss")(lambda self: "x")
    with pytest.raises(TypeError):
        emitted("ss", "only_one")(lambda self, text: None)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"colour": Variant("s", "red")}, "unknown option 'colour'"),
        ({"label": Variant("u", 1)}, "'label' of type u, it must be s"),
        ({"unlock": Variant("s", "x")}, "'unlock' of type s, it must be a{sv}"),
        ({"unlock": Variant("a{sv}", {"pin": Variant("s", "x")})}, "unknown option unlock. 'pin'"),
        ({"unlock": Variant("a{sv}", {"fd": Variant("h", 0)})}, "file descriptor 0"),
    ],
)
async def test_bad_options_are_refused_before_anybody_is_asked(bed, options, complaint):
    async with serve(authority=NobodyAsks()) as service, BusClient() as client:
        with pytest.raises(CallFailed) as caught:
            await client.call(PATH, INTERFACE, "Rotate", "sa{sv}", ["k", options])
        assert (caught.value.name, service.toy.calls) == (INVALID, [])
        assert complaint in caught.value.text


class NobodyAsks:
    """An authority that must not be reached."""

    async def check(self, caller, action, details):
        raise AssertionError(action)


class Asked:
    """An authority that remembers."""

    def __init__(self):
        self.questions = []

    async def check(self, caller, action, details):
        self.questions.append((caller, action, details))


@pytest.mark.asyncio
async def test_a_call_is_authorized_with_details_and_reaches_the_handler(bed):
    asked = Asked()
    async with serve(authority=asked) as service, BusClient() as client:
        options = {"label": Variant("s", "l"), "unlock": Variant("a{sv}", {"token": Variant("i", 3)})}
        reply = await client.call(PATH, INTERFACE, "Rotate", "sa{sv}", ["k", options], interactive=True)
        assert reply == ["rotated k"]
        caller, arguments = service.toy.calls[0]
        assert (caller.name, caller.uid, caller.interactive) == (client.name, 0, True)
        assert arguments == ["k", {"label": "l", "unlock": {"token": 3}}]
        details = {"operation": "Rotate", "device": "/dev/toy", "uuid": "1234", "key": "back?up"}
        silent = replace(caller, interactive=False)  # nobody is troubled where that is enough
        assert asked.questions == [(silent, names.ACTION_ROTATE, details)]


@pytest.mark.asyncio
async def test_a_volume_of_the_system_has_an_action_of_its_own(bed):
    asked = Asked()
    async with serve(authority=asked) as service, BusClient() as client:
        for service.toy.system in (True, False):
            await client.call(PATH, INTERFACE, "Rotate", "sa{sv}", ["k", {}])
        actions = [action for _, action, _ in asked.questions]
        assert actions == [names.ACTION_ROTATE + "-system", names.ACTION_ROTATE]


class Meanwhile(Asked):
    """Something happens while a person makes up their mind, once."""

    def __init__(self, event):
        super().__init__()
        self.event = event

    async def check(self, caller, action, details):
        await super().check(caller, action, details)
        event, self.event = self.event, lambda: None
        event()


@pytest.mark.asyncio
async def test_what_it_is_about_may_change_before_the_answer(bed):
    asked = Meanwhile(lambda: setattr(service.toy, "system", True))
    async with serve(authority=asked) as service, BusClient() as client:
        await client.call(PATH, INTERFACE, "Rotate", "sa{sv}", ["k", {}])
        actions = [action for _, action, _ in asked.questions]
        assert actions == [names.ACTION_ROTATE, names.ACTION_ROTATE + "-system"]


@pytest.mark.asyncio
async def test_an_answer_about_an_object_that_is_gone_is_void(bed):
    asked = Meanwhile(lambda: service.bus.unexport(PATH))
    async with serve(authority=asked) as service, BusClient() as client:
        with pytest.raises(CallFailed) as caught:
            await client.call(PATH, INTERFACE, "Rotate", "sa{sv}", ["k", {}])
        assert caught.value.name == names.ERROR_PREFIX + "UnknownDevice"
        assert service.toy.calls == []


@pytest.mark.asyncio
async def test_an_interface_that_does_not_know_its_volume_is_of_the_system(bed):
    questions = await Interface("x", None).questions(names.ACTION_ROTATE, "Rotate", [])
    assert questions == [Question(names.ACTION_ROTATE + "-system", {"operation": "Rotate"})]
    questions = await Interface("x", None).questions(names.ACTION_LIST, "GetDevices", [])
    assert questions == [Question(names.ACTION_LIST, {"operation": "GetDevices"})]


@pytest.mark.asyncio
async def test_overlapping_calls_each_know_their_caller(bed):
    async with serve(), BusClient() as one, BusClient() as two:
        calls = [client.call(PATH, INTERFACE, "WhoAmI", interactive=client is one) for client in [one, two] * 20]
        answers = await asyncio.gather(*calls)
        assert answers == [[one.name, 0, True], [two.name, 0, False]] * 20


@pytest.mark.asyncio
async def test_errors_carry_their_name_and_what_the_device_holds(bed):
    async with serve(), BusClient() as client:
        with pytest.raises(CallFailed) as caught:
            await client.call(PATH, INTERFACE, "Refuse")
        assert caught.value.name == "org.luksrotd1.Error.WrongCredential"
        assert caught.value.text == "cannot open toy (device: committed-wipe-pending)"


@pytest.mark.asyncio
async def test_an_unforeseen_exception_goes_to_the_log_only(bed, caplog):
    async with serve(), BusClient() as client:
        with pytest.raises(CallFailed) as caught:
            await client.call(PATH, INTERFACE, "Leak")
        assert caught.value.name == "org.luksrotd1.Error.Internal"
        assert caught.value.text == "cannot finish Leak: internal error (device: unknown-reconcile-needed)"
        assert SECRET in caplog.text


@pytest.mark.asyncio
async def test_properties_and_their_changes(bed):
    async with serve() as service, BusClient() as client:
        await client.subscribe()
        assert await client.get_all(PATH, INTERFACE) == {"Generation": 7, "Label": "toy", "UUID": "1234"}
        service.toy.revision = 8
        service.toy.changed("Generation", "Label", "UUID")
        changed = await client.signal("PropertiesChanged")
        assert (changed.path, changed.body) == (PATH, [INTERFACE, {"Generation": Variant("t", 8)}, ["Label"]])
        assert await client.get(PATH, INTERFACE, "Generation") == 8
        service.toy.noise(3, "bang")
        assert (await client.signal("Noise")).body == [3, "bang"]
        with pytest.raises(CallFailed, match="PropertyReadOnly"):
            await client.call(
                PATH, "org.freedesktop.DBus.Properties", "Set", "ssv", [INTERFACE, "Label", Variant("s", "x")]
            )
        for member in ("None", "Rotate"):
            with pytest.raises(CallFailed, match="UnknownProperty"):
                await client.get(PATH, INTERFACE, member)


@pytest.mark.asyncio
async def test_objects_are_managed_from_the_root_and_introspected(bed):
    async with serve(), BusClient() as client:
        managed = await client.call(names.ROOT_PATH, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
        assert list(managed[0]) == [PATH]
        assert managed[0][PATH][INTERFACE]["Generation"] == Variant("t", 7)
        node = await introspect(client, PATH)
        annotations = {item.get("name"): item.find("annotation").get("value") for item in node.iter("property")}
        assert annotations == {"Generation": Emits.VALUE, "Label": Emits.INVALIDATES, "UUID": Emits.CONST}
        rotate = node.find("./interface/method[@name='Rotate']")
        arguments = [(arg.get("name"), arg.get("type"), arg.get("direction")) for arg in rotate.findall("arg")]
        assert arguments == [("key", "s", "in"), ("options", "a{sv}", "in"), ("job", "s", "out")]
        assert [child.get("name") for child in (await introspect(client, "/")).findall("node")] == ["org"]
        with pytest.raises(CallFailed, match="UnknownObject"):
            await introspect(client, "/org/luks")


async def introspect(client, path):
    text = (await client.call(path, "org.freedesktop.DBus.Introspectable", "Introspect"))[0]
    return ElementTree.fromstring(text)
