# SPDX-License-Identifier: GPL-2.0-or-later
"""What a person does on an installed machine, by the tools that are there."""

import json

from tests.support.daemon_process import BACKUP


def enroll(container, volume):
    """Give the volume the managed key ``BACKUP``, by the ordinary one; /root/backup.key has it too."""
    container.put("/root/backup.key", BACKUP.decode(), mode=0o600)
    luksrotctl(container, "enroll", volume.node, "--key-file=/root/old.key", "--new-keyfile=/root/backup.key")


def luksrotctl(container, *arguments, **options):
    """Run it; what it printed."""
    return container.run("luksrotctl", *arguments, **options).stdout


def property_of(container, path, interface, name):
    """One property, as busctl has it in JSON."""
    shown = container.run("busctl", "--json=short", "get-property", "org.luksrotd1", path, interface, name).stdout
    return json.loads(shown)["data"]


def main_pid(container):
    """The daemon's process id, in the container; 0 if it does not run."""
    return int(container.run("systemctl", "show", "--property=MainPID", "--value", "luksrotd.service").stdout)


def settled(container, *units):
    """Whether none of the units is starting or stopping."""
    return not {"activating", "deactivating", "reloading"} & {
        container.run("systemctl", "is-active", unit, check=False).stdout.strip() for unit in units
    }
