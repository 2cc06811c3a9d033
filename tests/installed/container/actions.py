# SPDX-License-Identifier: GPL-2.0-or-later
"""What a person does on an installed machine, by the tools that are there."""

import json

from tests.beds.waiting import until
from tests.support.daemon_process import BACKUP, NEW

DROP_IN = "/etc/systemd/system/luksrotd.service.d/50-test.conf"


def enroll(container, volume):
    """Give the volume the managed key ``BACKUP``, by the ordinary one; /root/backup.key has it too."""
    container.put("/root/backup.key", BACKUP.decode(), mode=0o600)
    luksrotctl(container, "enroll", volume.node, "--key-file=/root/old.key", "--new-keyfile=/root/backup.key")


def rotate(container, volume):
    """Start a rotation of the key ``BACKUP`` to ``NEW``, by busctl; nobody waits for its end.  The job's path."""
    container.put("/root/new.key", NEW.decode(), mode=0o600)
    reply = container.run(
        *("busctl", "--json=short", "call", "org.luksrotd1", volume.path, "org.luksrotd1.Device", "Rotate"),
        *("sa{sv}a{sv}a{sv}", "backup", "1", "keyfile", "s", "/root/backup.key"),
        *("1", "keyfile", "s", "/root/new.key", "0"),
    )
    return json.loads(reply.stdout)["data"][0]


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


def put_drop_in(container, text):
    """Have these lines in the section [Service] of the daemon's unit, from its next start on."""
    container.put(DROP_IN, f"[Service]\n{text}\n")
    container.run("systemctl", "daemon-reload")


def remove_drop_in(container):
    """Take them back, likewise."""
    container.run("rm", DROP_IN)
    container.run("systemctl", "daemon-reload")


def active_again(container, pid):
    """Wait until systemd has started the daemon anew, in place of that process."""
    until(lambda: main_pid(container) not in (0, pid), "it is started again")
    until(lambda: container.show("luksrotd.service")["ActiveState"] == "active", "it has started")


def apt(container, *arguments):
    """apt-get, which asks nothing; what it said."""
    quiet = ("-o", "Dpkg::Use-Pty=0", "--quiet", "--yes")
    return container.run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", *quiet, *arguments).stdout


def package_status(container):
    """What dpkg thinks of the package: ``installed``, ``config-files`` or ``not-installed``."""
    query = ("dpkg-query", "--show", "--showformat=${db:Status-Status}", "luksrotd")
    return container.run(*query, check=False).stdout or "not-installed"
