# SPDX-License-Identifier: GPL-2.0-or-later
"""What the service manager hears, over a real notification socket."""

import socket
import subprocess
import sys
import time

import pytest

from luksrotd.host.notify import ServiceManager, StatusLine, inherited_socket, watchdog_interval


@pytest.fixture
def manager(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield lambda: listener.recv(4096).decode().splitlines()


def test_it_hears_each_state(manager):
    service = ServiceManager()
    service.ready()
    assert manager() == ["READY=1"]
    service.ready("2 volumes")
    assert manager() == ["READY=1", "STATUS=2 volumes"]
    service.status("rotating /dev/x")
    assert manager() == ["STATUS=rotating /dev/x"]
    service.watchdog()
    assert manager() == ["WATCHDOG=1"]
    service.extend(1.5)
    assert manager() == ["EXTEND_TIMEOUT_USEC=1500000"]
    service.stopping("1 job left")
    assert manager() == ["STOPPING=1", "STATUS=1 job left"]


def test_a_reload_says_when_it_began(manager):
    before = time.monotonic_ns() // 1000
    ServiceManager().reloading()
    state, began = manager()
    assert state == "RELOADING=1"
    name, value = began.split("=")
    assert (name, before <= int(value) <= time.monotonic_ns() // 1000) == ("MONOTONIC_USEC", True)


def test_the_status_line_is_shown_from_ready_to_stopping_with_what_is_wrong(manager):
    volumes = 2
    line = StatusLine(ServiceManager(), lambda: f"{volumes} volumes")
    line.show()
    line.say("bus", "no bus")
    line.ready()
    assert manager() == ["READY=1", "STATUS=no bus; 2 volumes"]
    volumes = 3
    line.ready(configuration="bad file")
    assert manager() == ["READY=1", "STATUS=no bus; bad file; 3 volumes"]
    line.say("bus", "")
    assert manager() == ["STATUS=bad file; 3 volumes"]
    line.ready(configuration="")
    assert manager() == ["READY=1", "STATUS=3 volumes"]
    line.stopping("going")
    line.show()
    line.reloading()  # SIGHUP may come at any time
    line.ready(configuration="bad file")
    assert manager() == ["STOPPING=1", "STATUS=going"]
    with pytest.raises(BlockingIOError):
        manager()


def test_a_status_cannot_smuggle_in_another_assignment(manager):
    ServiceManager().status("label\nSTOPPING=1\n")
    assert manager() == ["STATUS=label STOPPING=1"]


@pytest.mark.parametrize("path", [None, "/nonexistent/notify", "@luksrotd-nobody-listens", "nonsense"])
def test_without_a_manager_nothing_happens(monkeypatch, path):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if path:
        monkeypatch.setenv("NOTIFY_SOCKET", path)
    service = ServiceManager()
    service.ready()
    service.status("")
    service.watchdog()
    service.stopping()
    service.reloading()
    service.extend(1)


@pytest.mark.parametrize(
    ("environment", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "42"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "43"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "self"}, None),
    ],
)
def test_the_watchdog_wants_to_hear_twice_as_often_as_it_bites(environment, interval):
    assert watchdog_interval(environment, pid=42) == interval


USED = """
import os, sys
from luksrotd.host.notify import inherited_socket
fd = inherited_socket(sys.argv[1])
print(fd, fd is not None and os.get_inheritable(fd))
"""


@pytest.mark.parametrize(
    ("names", "found"), [("udev", "3 False"), ("other:udev", "4 False"), ("other", "None False")], ids=str
)
def test_a_socket_is_inherited_by_its_name(names, found, monkeypatch):
    with socket.socket(socket.AF_UNIX) as given:
        command = ["sh", "-c", 'LISTEN_PID=$$ exec "$@" 3<&0 4<&0', "sh", sys.executable, "-c", USED, "udev"]
        monkeypatch.setenv("LISTEN_FDS", str(len(names.split(":"))))
        monkeypatch.setenv("LISTEN_FDNAMES", names)
        done = subprocess.run(command, stdin=given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found


def test_without_a_service_manager_no_socket_is_inherited(monkeypatch):
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    assert inherited_socket("udev") is None
