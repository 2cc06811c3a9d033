# SPDX-License-Identifier: GPL-2.0-or-later
"""What the exported interfaces hand their calls to."""

from luksrotd.records import dataclass
from luksrotd.service.drafts import Drafts
from luksrotd.service.history import Chronicle
from luksrotd.service.operations import Operations
from luksrotd.service.registry import Registry
from luksrotd.service.runner import Runner
from luksrotd.service.setjobs import SetJobs


@dataclass(frozen=True, slots=True)
class Served:
    """The parts of the service; they outlive a connection."""

    operations: Operations
    sets: SetJobs
    drafts: Drafts
    registry: Registry
    runner: Runner
    chronicle: Chronicle
