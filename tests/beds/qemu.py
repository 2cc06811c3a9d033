# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU process and its monitor.  It emulates (TCG), so it needs nothing of the machine, and takes its time."""

import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tests.support.kernel import die_with_parent

PROGRAM: Final = "qemu-system-x86_64"
MONITOR_SECONDS: Final = 60.0


class Qemu:
    """One process, started with ``arguments``; it dies with this one.

    ``agent`` is the host's end of the virtio-serial port that the arguments call ``agent``.
    """

    def __init__(self, arguments: Sequence[str], port: str) -> None:
        monitor, its_monitor = socket.socketpair()
        self.agent, its_agent = socket.socketpair()
        self._said = tempfile.TemporaryDirectory(prefix="luksrotd-qemu-")
        console, errors = self._logs()
        passed = (its_monitor.fileno(), its_agent.fileno())
        channels = [
            *("-chardev", f"socket,id=monitor,fd={passed[0]}", "-mon", "chardev=monitor,mode=control"),
            *("-chardev", f"socket,id=agent,fd={passed[1]}", "-device", "virtio-serial-pci"),
            *("-device", f"virtserialport,chardev=agent,name={port}"),
            *("-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"),
        ]
        with errors.open("wb") as output:
            self.process = subprocess.Popen(
                [PROGRAM, *arguments, *channels],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=passed,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - takes no lock
            )
        its_monitor.close()
        its_agent.close()
        self._monitor = monitor
        self._monitor.settimeout(MONITOR_SECONDS)
        self._messages = monitor.makefile("rb")
        try:
            self._receive()
            self.command("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def command(self, name: str, **arguments: Any) -> Any:
        """A command of QMP, and its answer; MachineError if it is refused, or QEMU has gone."""
        message = json.dumps({"execute": name, "arguments": arguments})
        try:
            self._monitor.sendall(message.encode())
        except OSError as error:
            raise MachineError(f"{name}: {error}\n{self.said}") from error
        while True:
            answer = self._receive()
            if "error" in answer:
                raise MachineError(f"{name}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def wait_for(self, command: str, *states: str) -> str:
        """Ask ``query-…`` until its ``status`` is one of these; MachineError if it does not come to that."""
        deadline = time.monotonic() + MONITOR_SECONDS
        while (state := str(self.command(command).get("status"))) not in states:
            if time.monotonic() > deadline:
                raise MachineError(f"{command}: {state}, not {' or '.join(states)}\n{self.said}")
            time.sleep(0.01)
        return state

    @property
    def said(self) -> str:
        """QEMU's own messages, and the guest's console."""
        return "".join(path.read_text(errors="replace") for path in self._logs() if path.exists())

    def close(self) -> None:
        """End it as a power cut would; idempotent."""
        self.process.kill()
        self.process.wait()
        for channel in (self.agent, self._messages, self._monitor):
            channel.close()
        self._said.cleanup()

    def _logs(self) -> tuple[Path, Path]:
        return Path(self._said.name, "console"), Path(self._said.name, "errors")

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._messages.readline()
        except OSError as error:
            raise MachineError(f"the monitor does not answer: {error}\n{self.said}") from error
        if not line:
            raise MachineError(f"QEMU has ended\n{self.said}")
        message: dict[str, Any] = json.loads(line)
        return message


class MachineError(AssertionError):
    """A machine, or something in it, does not do what it was asked for."""
