# SPDX-License-Identifier: GPL-2.0-or-later
"""A volume's object, apart from the service behind it."""

from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
from dbus_next.signature import Variant

from luksrotd.bus.device import Device
from luksrotd.bus.frames import entries
from luksrotd.bus.secrets import Keyring
from luksrotd.config import Config
from luksrotd.errors import Conflict, UnknownDevice
from luksrotd.ports import Caller, Traits
from luksrotd.service.handover import Secrets
from luksrotd.service.shown import Place, Volume

pytestmark = pytest.mark.asyncio
CALLER = Caller(":1.5", 1000, False)
REMOVABLE = Volume("0" * 8, (Place("/dev/sdx", traits=Traits((), "usb", True)),))
OF_SYSTEM = replace(REMOVABLE, places=(Place("/dev/sdx"),))


class Slow(Keyring):
    """A person takes so long to allow a secret that something happens meanwhile; counts what is left open."""

    def __init__(self, event):
        self.event = event
        self.open_secrets = 0

    def close(self):
        self.open_secrets -= 1

    async def open(self, caller, details, described):
        self.event()
        self.open_secrets += 1
        resources = ExitStack()
        resources.callback(self.close)
        return Secrets({}, resources)


async def test_its_properties_are_made_once_for_each_time_that_it_is_shown():
    busy = [False]
    runner = SimpleNamespace(busy=lambda _: busy[0])
    device = Device(None, None, SimpleNamespace(operations=None, runner=runner, drafts=None), REMOVABLE)
    told = []
    device.exported(SimpleNamespace(send=told.append), "/x")
    before = device.entries()
    assert device.entries() is before == entries(device.values())
    busy[0] = True
    device.show()
    assert device.values()["Busy"].value is True
    assert device.entries() == entries(device.values()) != before
    device.show(OF_SYSTEM)
    assert device.values() == {name: item.variant(device) for name, item in Device.properties.items()}
    assert device.entries() == entries(device.values())
    assert [set(signal.body[1]) for signal in told] == [{"Busy"}, {"System"}]


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (lambda device: device.exported(None, "/x"), UnknownDevice),
        (lambda device: device.show(OF_SYSTEM), Conflict),
    ],
    ids=["withdrawn", "of the system"],
)
@pytest.mark.parametrize("method", ["rotate", "verify_key"])
async def test_secrets_that_were_allowed_for_another_volume_are_closed(event, error, method):
    keyring = Slow(lambda: event(device))
    served = SimpleNamespace(
        operations=SimpleNamespace(config=Config()), runner=SimpleNamespace(busy=lambda _: False), drafts=None
    )
    device = Device(None, keyring, served, REMOVABLE)
    device.exported(SimpleNamespace(send=lambda _: None), "/x")
    secrets = [{"keyfile": Variant("s", "/key")}] * (2 if method == "rotate" else 1)
    with pytest.raises(error):
        await getattr(device, method)(CALLER, "", *secrets, {})
    assert keyring.open_secrets == 0
