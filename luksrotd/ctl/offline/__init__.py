# SPDX-License-Identifier: GPL-2.0-or-later
"""Verbs that work with ``--direct`` only, a module for each group of them.

To add one: ``verbs.add(name, run, summary, example)`` in ``add`` of its module, its arguments on the parser that this
returns, and ``run(options)``, which gives ``base.call`` the work to do on ``Local.volumes`` and makes a ``Report`` of
what comes out.  Modules beyond ``ctl``, ``errors``, ``names`` and ``rotation.edits`` are imported in functions only.
"""

from typing import Final, Protocol

from luksrotd.ctl.arguments import Verbs
from luksrotd.ctl.offline import header, suspects


class Module(Protocol):
    """A group of verbs."""

    def add(self, verbs: Verbs) -> None:
        """Add them to the command line."""


#: In the order in which --help shows them.
MODULES: Final[tuple[Module, ...]] = (header, suspects)
