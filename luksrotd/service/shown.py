# SPDX-License-Identifier: GPL-2.0-or-later
"""A volume as the registry shows it."""

from dataclasses import dataclass, field
from typing import NamedTuple

from luksrotd.ports import DeviceRef, Traits
from luksrotd.rotation.ledger import ForeignChange
from luksrotd.rotation.reconcile import Action
from luksrotd.rotation.view import Summary

Key = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a volume shows itself: a device node or image file, the detached header if it has one, and what it is."""

    node: str
    header: str | None = None
    traits: Traits = field(default_factory=Traits)

    @property
    def key(self) -> Key:
        """What is written to, and who shows it."""
        return self.node, self.header


class Problem(NamedTuple):
    """What is not as it should be: a stable code, ``repair`` or ``person``, and a message."""

    code: str
    action: str
    message: str


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume in at least one place; ``view`` is None while it cannot be read, and ``problems`` say why.

    ``foreign``: what somebody else has changed since it was examined before.
    """

    uuid: str
    places: tuple[Place, ...]
    view: Summary | None = None
    problems: tuple[Problem, ...] = ()
    foreign: ForeignChange | None = None

    @property
    def ref(self) -> DeviceRef:
        """The device that is used, with the UUID that it must show."""
        return DeviceRef(self.places[0].node, self.places[0].header, self.uuid)

    @property
    def nodes(self) -> tuple[str, ...]:
        """All device nodes and image files that show the UUID."""
        return tuple(place.node for place in self.places)

    @property
    def keys(self) -> tuple[Key, ...]:
        """What its places are told apart by."""
        return tuple(place.key for place in self.places)

    @property
    def links(self) -> tuple[str, ...]:
        """Other names of the nodes."""
        return tuple(sorted({link for place in self.places for link in place.traits.links}))

    @property
    def header(self) -> str:
        """Where the detached header is; '' if it is not detached."""
        return self.places[0].header or ""

    @property
    def system(self) -> bool:
        """Whether it belongs to the machine, and not to who has plugged it in."""
        return not all(place.traits.removable for place in self.places)

    @property
    def ambiguous(self) -> bool:
        """Whether several devices show the UUID: copies, or one below the other.  Nobody knows which one to write."""
        return len(self.places) > 1

    @property
    def ambiguity(self) -> str:
        """Which devices show it."""
        return f"{' and '.join(self.nodes)} show one UUID, {self.uuid}"

    @property
    def repairable(self) -> bool:
        """Whether reconcile would mend something."""
        return not self.ambiguous and any(problem.action == Action.REPAIR for problem in self.problems)
