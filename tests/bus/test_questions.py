# SPDX-License-Identifier: GPL-2.0-or-later
"""What polkit is asked about volumes, alone and in sets."""

import pytest

from luksrotd import names
from luksrotd.bus.device import Device
from luksrotd.bus.exposed import Exposed
from luksrotd.bus.guard import Question
from luksrotd.bus.questions import about_set
from luksrotd.bus.served import Served
from luksrotd.ports import Traits
from luksrotd.service.runner import Runner
from luksrotd.service.shown import Place, Volume

ROTATE, STAGE = names.ACTION_ROTATE, names.ACTION_STAGE


def volume(node, *, removable):
    return Volume(f"uuid-of-{node}", (Place(node, traits=Traits(removable=removable)),))


def device(volume):
    served = Served(**dict.fromkeys(("operations", "sets", "drafts", "registry", "chronicle")), runner=Runner())
    return Device(None, None, served, volume)


@pytest.mark.asyncio
@pytest.mark.parametrize(("removable", "action"), [(True, ROTATE), (False, names.system_action(ROTATE))])
async def test_a_device_is_of_the_system_unless_it_is_removable(removable, action):
    shown = device(volume("/dev/a", removable=removable))
    assert shown.values()["System"].value is not removable
    details = {"operation": "Rotate", "device": "/dev/a", "uuid": "uuid-of-/dev/a", "key": "backup"}
    assert await shown.questions(ROTATE, "Rotate", ["", {}, {}, {}]) == [Question(action, details)]


@pytest.mark.asyncio
async def test_what_a_device_is_may_change():
    """A copy of it on a disk of the machine: nobody knows any more which one is meant."""
    stick = volume("/dev/a", removable=True)
    shown = device(stick)
    shown.show(Volume(stick.uuid, (*stick.places, Place("/dev/b"))))
    (question,) = await shown.questions(ROTATE, "Rotate", ["", {}, {}, {}])
    assert question.action == names.system_action(ROTATE)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("options", "further"),
    [
        ({}, []),
        ({"retire-expired": True}, [names.ACTION_ABORT]),
        ({"retire-expired": True, "dry-run": True}, []),
        ({"retire-expired": False}, []),
    ],
)
async def test_who_has_staged_keys_aborted_by_a_reconcile_needs_that_right_too(options, further):
    shown = device(volume("/dev/a", removable=True))
    asked = await shown.questions(names.ACTION_RECONCILE, "Reconcile", [options])
    assert [question.action for question in asked] == [names.ACTION_RECONCILE, *further]


def test_every_method_that_changes_or_tells_of_one_volume_has_the_stricter_action_too():
    methods = [member for member in vars(Device).values() if isinstance(member, Exposed)]
    general = {method.name for method in methods if method.action not in names.VOLUME_ACTIONS}
    assert general == {"Plan", "Reconcile"}


def test_of_a_set_each_volume_is_asked_about_once_with_its_own_action():
    stick, disk = volume("/dev/stick", removable=True), volume("/dev/disk", removable=False)
    details = {"operation": "Stage", "key": "backup", "set": "/dev/stick /dev/disk"}
    assert about_set(STAGE, "Stage", [stick, disk, stick], "backup") == [
        Question(STAGE, {**details, "device": "/dev/stick", "uuid": "uuid-of-/dev/stick"}),
        Question(names.system_action(STAGE), {**details, "device": "/dev/disk", "uuid": "uuid-of-/dev/disk"}),
    ]
