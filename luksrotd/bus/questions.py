# SPDX-License-Identifier: GPL-2.0-or-later
"""What polkit is asked about several volumes at once."""

from collections.abc import Mapping, Sequence

from luksrotd import names
from luksrotd.bus.guard import Question
from luksrotd.service.registry import Volume


def about_set(action: str, operation: str, volumes: Sequence[Volume], key: str) -> list[Question]:
    """A question for each volume of a set, with its own action and details; ``set`` names the devices of all.

    For ``Interface.questions``; an empty set is nobody's right (``Guard.authorize_all``).
    """
    together = set_details(volumes, key)["device"]
    return [
        Question(
            names.system_action(action) if volume.system else action,
            {"operation": operation, "device": volume.nodes[0], "uuid": volume.uuid, "key": key, "set": together},
        )
        for volume in volumes
    ]


def set_details(volumes: Sequence[Volume], key: str) -> Mapping[str, str]:
    """Details of a question that is asked once for the whole set, as about a key file."""
    devices, uuids = ([volume.nodes[0] for volume in volumes], [volume.uuid for volume in volumes])
    return {"device": " ".join(devices), "uuid": " ".join(uuids), "key": key}
