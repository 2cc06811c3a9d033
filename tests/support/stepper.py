# SPDX-License-Identifier: GPL-2.0-or-later
"""An operation of the stepwise engine on an image, as a command for the recorder: ``python -m tests.support.stepper
VERB IMAGE``, with a verb of ``crashverbs.VERBS``."""

import sys

from luksrotd.host.live import LiveWorkerEngine
from luksrotd.ports import DeviceRef
from luksrotd.service.stepwise import StepwiseVolumes
from tests.support.crashverbs import VERBS
from tests.support.realvolume import RealVolume
from tests.support.simdisk import Write


def main(verb: str, image: str) -> None:
    """Run it."""
    volume = RealVolume(DeviceRef(image))
    volume.volumes = StepwiseVolumes(volume.host, LiveWorkerEngine())
    VERBS[verb].operate(volume)
    assert not any(isinstance(each, Write) for each in volume.log), "the stepwise engine has written by itself"


if __name__ == "__main__":
    main(*sys.argv[1:])
