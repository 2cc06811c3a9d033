# SPDX-License-Identifier: GPL-2.0-or-later
"""Records, once for each volume, what a person must decide about it."""

from luksrotd.rotation.reconcile import Action
from luksrotd.service.audit import Audit
from luksrotd.service.shown import Problem, Volume


class Reporter:
    """Observes the registry; what it has recorded it records again only if that has changed meanwhile."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._told: dict[str, tuple[Problem, ...]] = {}

    def volume_added(self, volume: Volume) -> None:
        """Nothing: ``volume_changed`` follows."""

    def volume_changed(self, volume: Volume, *, fresh: bool) -> None:
        """Record what has come to need a person."""
        problems = tuple(problem for problem in volume.problems if problem.action == Action.PERSON)
        if problems and problems != self._told.get(volume.uuid):
            self._audit.needs_person(volume.ref, volume.uuid, problems)
        self._told[volume.uuid] = problems

    def volume_removed(self, volume: Volume) -> None:
        """Forget it."""
        self._told.pop(volume.uuid, None)
