# SPDX-License-Identifier: GPL-2.0-or-later
"""A private system: bus, polkit, udev, journal and loop devices, of which nothing is left on the host.

    with TestBed() as bed:
        bed.set_rules("polkit.addRule(function () { return polkit.Result.YES; });")
        disk = bed.loop(image)
        daemon = bed.spawn([sys.executable, "-m", "luksrotd"])

The process that enters it moves into a mount namespace of its own, so it and all its children see a /run of their own
with the distribution's dbus-daemon (stock ``system.conf``, at the standard address), polkitd, systemd-udevd and
systemd-journald in it, this project's bus policy and polkit actions, and no bus activation.  Needs root, not PID 1.

With ``LUKSROTD_TEST_BUS=dbus-broker`` in the environment the bus is dbus-broker, which packaging/install-deps unpacks:
its package, installed, would be the machine's own bus.

What cannot be private: loop devices, /dev and uevents are the machine's.  Where a udevd already runs it is used.
"""

import os
import pwd
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support import kernel
from tests.support.children import Children
from tests.support.kernel import LoopDevice
from tests.support.polkit_agent import Agent

PROJECT = Path(__file__).resolve().parents[2]
START_SECONDS = 20.0
BUS_SOCKET = Path("/run/dbus/system_bus_socket")
JOURNAL_SOCKET = Path("/run/systemd/journal/socket")
BUS_ARGV = ["dbus-daemon", "--system", "--nofork", "--nopidfile", "--nosyslog"]
BROKER = PROJECT / "build" / "dbus-broker" / "usr" / "bin"
BUS_VARIABLE = "LUKSROTD_TEST_BUS"
RULES_DIRECTORY = Path("/etc/polkit-1/rules.d")
ACTIONS_DIRECTORY = Path("/usr/share/polkit-1/actions")
JOURNALD_CONF = "[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\nRateLimitBurst=0\nForwardToSyslog=no\n"


class TestBed:
    """See the module; ``dir`` is a scratch directory in memory that vanishes with the bed."""

    __test__ = False  # not a test class, whatever its name

    def __init__(self) -> None:
        self.dir = Path("/run/luksrotd-testbed")
        self._stack = ExitStack()
        self._rules_loaded = 0
        self._polkitd: subprocess.Popen[Any] | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._stack = stack
            has_udevd = Path("/run/udev/control").exists()
            self._mount(has_udevd)
            self._children = Children()
            stack.callback(self._children.close)
            if os.environ.get(BUS_VARIABLE) == "dbus-broker":
                self._start_journald()  # which its launcher insists on
                self._use_broker()
            self._start_bus()
            if not has_udevd:
                self._start("systemd-udevd", ["/lib/systemd/systemd-udevd"], Path("/run/udev/control").exists)
            if not JOURNAL_SOCKET.exists():
                self._start_journald()
            self.start_polkitd()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # -- what tests ask for ---------------------------------------------------------------------------------------

    @property
    def bus_pid(self) -> int:
        """Process id of dbus-daemon."""
        return self._bus.pid

    @property
    def polkitd_pid(self) -> int:
        """Process id of polkitd; 0 while it is stopped."""
        return self._polkitd.pid if self._polkitd else 0

    @property
    def activation(self) -> Path:
        """Where dbus-daemon looks for services that it can start, after a ReloadConfig; empty."""
        return self.dir / "activation"

    def spawn(self, argv: Sequence[str | Path], **popen: Any) -> subprocess.Popen[Any]:
        """Start a process that ends with the bed, in reverse order, and dies with this process whatever happens."""
        return self._children.spawn(argv, **popen)

    def end(self, child: subprocess.Popen[Any]) -> int:
        """End one process of ``spawn`` early and reap it; its exit status."""
        return self._children.end(child)

    def user(self, name_or_uid: str | int = "nobody") -> pwd.struct_passwd:
        """An unprivileged user that every Debian has (base-passwd), such as ``nobody`` and ``games``."""
        return pwd.getpwuid(name_or_uid) if isinstance(name_or_uid, int) else pwd.getpwnam(name_or_uid)

    def loop(self, image_path: Path, sector_size: int = 512) -> LoopDevice:
        """Attach an image; detached at the end of the bed, and by the kernel should this process be killed."""
        device = LoopDevice(image_path, sector_size)
        self._stack.callback(device.detach)
        return device

    def agent(self, mode: str, pid: int, uid: int, *, locale: str = "C") -> Agent:
        """Answer polkit's questions about process ``pid`` of user ``uid``: ``yes``, ``cancel`` or ``ignore``."""
        agent = Agent(self.spawn(Agent.argv(mode, pid, uid, locale), stdout=subprocess.PIPE, cwd=PROJECT))
        self._stack.callback(self.end, agent.process)
        agent.wait_for("registered")
        return agent

    def set_rules(self, js_text: str) -> None:
        """Replace the polkit rules by this JavaScript, and return when polkitd has loaded them."""
        self._rules_loaded += 1
        marker = f"testbed-rules-{self._rules_loaded}-loaded"
        draft = RULES_DIRECTORY / ".draft"
        draft.write_text(f"{js_text}\npolkit.log('{marker}');\n")
        draft.chmod(0o644)
        draft.rename(RULES_DIRECTORY / "10-testbed.rules")
        if self._polkitd:
            self._wait("polkit rules", lambda: marker in self.log("polkitd"), self._polkitd)

    def kill_bus(self) -> None:
        """Kill dbus-daemon, as a crash of it would; polkitd ends with it.  Nothing starts it again."""
        self._bus.kill()
        self._bus.wait()
        self.end(self._bus)
        BUS_SOCKET.unlink()
        self.stop_polkitd()

    def start_bus(self) -> None:
        """Start it again, at the same address, and polkitd."""
        self._run_bus()
        self.start_polkitd()

    def stop_polkitd(self) -> None:
        """End polkitd; nothing activates it again."""
        if self._polkitd:
            self.end(self._polkitd)
            self._polkitd = None

    def start_polkitd(self) -> None:
        """Start polkitd (again)."""
        log = self.dir / "polkitd.log"
        log.unlink(missing_ok=True)
        self._polkitd = self._start(
            "polkitd", ["/usr/lib/polkit-1/polkitd"], lambda: "Acquired the name" in self.log("polkitd")
        )

    def log(self, name: str) -> str:
        """What ``dbus-daemon``, ``polkitd``, ``systemd-udevd`` or ``systemd-journald`` printed."""
        path = self.dir / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # -- how it is made -------------------------------------------------------------------------------------------

    def _mount(self, has_udevd: bool) -> None:
        kernel.enter_private_mount_namespace()
        machine_udev = os.open("/run/udev", os.O_PATH | os.O_CLOEXEC) if has_udevd else -1
        self._tmpfs("/run")
        for directory in ("dbus", "udev", "log", "lock", "luksrotd-testbed", "systemd/journald.conf.d"):
            (Path("/run") / directory).mkdir(parents=True)
        for directory in ("journal", "seats", "sessions", "users", "machines"):
            (Path("/run/systemd") / directory).mkdir()
        Path("/run/systemd/journald.conf.d/testbed.conf").write_text(JOURNALD_CONF)
        if has_udevd:
            self._bind(Path(f"/proc/self/fd/{machine_udev}"), Path("/run/udev"))
            os.close(machine_udev)

        actions = self._copy("actions", ACTIONS_DIRECTORY, "org.freedesktop.policykit.policy", PROJECT / "polkit")
        self._bind(actions, ACTIONS_DIRECTORY)
        shipped = Path("/usr/share/polkit-1/rules.d")
        self._bind(self._copy("rules-shipped", shipped, "50-default.rules"), shipped)
        self._bind(self._copy("rules"), RULES_DIRECTORY)
        self._bind(self._copy("bus-policy", more=PROJECT / "dbus"), Path("/etc/dbus-1/system.d"))
        self._bind(self._copy("activation"), Path("/usr/share/dbus-1/system-services"))

    def _copy(self, name: str, source: Path | None = None, pattern: str = "", more: Path | None = None) -> Path:
        """A directory of the bed with files of the distribution (``pattern``) and of the project (.conf, .policy)."""
        directory = self.dir / name
        directory.mkdir()
        found = list(source.glob(pattern)) if source else []
        found += [path for path in more.iterdir() if path.suffix in {".conf", ".policy"}] if more else []
        for path in found:
            (directory / path.name).write_bytes(path.read_bytes())
        return directory

    def _tmpfs(self, target: str) -> None:
        kernel.mount("testbed", target, "tmpfs", data="mode=755")
        self._stack.callback(kernel.unmount, target)

    def _bind(self, source: Path, target: Path) -> None:
        kernel.mount(source, target, flags=kernel.MS_BIND)
        self._stack.callback(kernel.unmount, target)

    def _start_bus(self) -> None:
        address = os.environ.pop("DBUS_SYSTEM_BUS_ADDRESS", None)
        if address is not None:
            self._stack.callback(os.environ.__setitem__, "DBUS_SYSTEM_BUS_ADDRESS", address)
        self._run_bus()

    def _run_bus(self) -> None:
        if os.environ.get(BUS_VARIABLE) != "dbus-broker":
            self._bus = self._start("dbus-daemon", BUS_ARGV, BUS_SOCKET.exists)
            return
        with socket.socket(socket.AF_UNIX) as listening:  # its launcher takes it over, sd_listen_fds(3)
            BUS_SOCKET.unlink(missing_ok=True)
            listening.bind(str(BUS_SOCKET))
            BUS_SOCKET.chmod(0o666)
            listening.listen()
            number = listening.fileno()
            script = f"exec 3<&{number}; export LISTEN_PID=$$ LISTEN_FDS=1; exec dbus-broker-launch --scope system"
            self._bus = self._start("dbus-broker", ["/bin/bash", "-c", script], BUS_SOCKET.exists, pass_fds=(number,))

    def _use_broker(self) -> None:
        """Have dbus-broker where its launcher looks for it."""
        if not (BROKER / "dbus-broker-launch").exists():
            raise RuntimeError(f"cannot find {BROKER}/dbus-broker-launch: run packaging/install-deps")
        kernel.mount("overlay", "/usr/bin", "overlay", kernel.MS_RDONLY, f"lowerdir={BROKER}:/usr/bin")
        self._stack.callback(kernel.unmount, "/usr/bin")

    def _start_journald(self) -> None:
        self._start("systemd-journald", ["/lib/systemd/systemd-journald"], JOURNAL_SOCKET.exists)

    def _start(self, name: str, argv: list[str], ready: Callable[[], bool], **popen: Any) -> subprocess.Popen[Any]:
        with (self.dir / f"{name}.log").open("wb") as log:
            child = self.spawn(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, **popen)
        self._wait(name, ready, child)
        return child

    def _wait(self, name: str, ready: Callable[[], bool], child: subprocess.Popen[Any]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if child.poll() is not None or time.monotonic() > deadline:
                log = (self.dir / f"{name}.log").read_text(errors="replace") if child.poll() is not None else ""
                raise RuntimeError(f"cannot start {name} (exit status {child.poll()})\n{log}")
            time.sleep(0.005)


def unprivileged_argv(uid: int, module: str, *arguments: str) -> list[str]:
    """Command line that imports ``module`` as root, becomes ``uid`` and then runs ``module.main(arguments)``."""
    return [sys.executable, "-m", "tests.support.unprivileged", str(uid), module, *arguments]
