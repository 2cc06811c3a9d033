# SPDX-License-Identifier: GPL-2.0-or-later
"""``luksrotctl`` that is killed on the way: ``python -m tests.demo.killed FAULT ARGUMENTS``.

FAULT is that of ``tests.support.daemon_launcher``; what is wrapped is the same, only without a daemon around it.
"""

import json
import sys
from dataclasses import replace
from typing import Any

from luksrotd import direct
from luksrotd.ctl.__main__ import main
from luksrotd.ports import Host
from tests.support.daemon_launcher import Fault, FaultyDevices

if __name__ == "__main__":
    fault = Fault(json.loads(sys.argv[1]))
    build_host = direct.build_host

    def build_faulty_host(**ports: Any) -> Host:
        """The ports, with devices that fail."""
        host = build_host(**ports)
        return replace(host, devices=FaultyDevices(host.devices, fault))

    direct.build_host = build_faulty_host
    sys.exit(main(sys.argv[2:]))
