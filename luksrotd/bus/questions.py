# SPDX-License-Identifier: GPL-2.0-or-later
"""What polkit is asked about several volumes at once."""

from collections.abc import Sequence

from luksrotd import names
from luksrotd.bus.guard import Question
from luksrotd.service.shown import Volume


def about_set(action: str, operation: str, volumes: Sequence[Volume], key: str) -> list[Question]:
    """A question for each volume of a set, with its own action and details; ``set`` names the devices of all.

    For ``Interface.questions``.  However often a volume is named, it is asked about once; an empty set is nobody's
    right (``Guard.authorize_all``).
    """
    members = list({volume.uuid: volume for volume in volumes}.values())
    together = " ".join(volume.nodes[0] for volume in members)
    return [
        Question(
            names.system_action(action) if volume.system else action,
            {"operation": operation, "device": volume.nodes[0], "uuid": volume.uuid, "key": key, "set": together},
        )
        for volume in members
    ]
