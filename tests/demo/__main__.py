# SPDX-License-Identifier: GPL-2.0-or-later
"""``make demo``: the main job on a real volume.  Exit status: 0 as promised, 1 not so, 130 interrupted."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from luksrotd.errors import LuksrotdError
from tests.demo.commands import Commands
from tests.demo.play import Play
from tests.demo.screen import Broken, Screen
from tests.demo.ways import PREFIX, ThroughTheDaemon, Way, WithoutDaemon
from tests.support.kernel import LoopDevice
from tests.support.testbed import TestBed

IMAGE_SIZE = 24 * 1024 * 1024
"""The header takes 16 MiB by default."""
SETTLE_SECONDS = 5
INTERRUPTED = 130


def main() -> int:
    """Show everything; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description="Show what luksrotd does.")
    parser.add_argument("--image", action="store_true", help="as where loop devices cannot be had: on an image file")
    options = parser.parse_args()
    screen, began = Screen(), time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        reason = "it was asked for" if options.image else _why_no_loop_device()
        with _on_image(screen, reason) if reason else _on_loop_device(screen) as (commands, way):
            _play(screen, Play(screen, commands, way))
    except KeyboardInterrupt:
        screen.end("interrupted; nothing is left behind", good=False)
        return INTERRUPTED
    except (Broken, LuksrotdError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        screen.end(f"not as promised: {error}", good=False)
        return 1
    screen.end(f"All as promised, in {time.monotonic() - began:.0f} s; nothing is left behind.", good=True)
    return 0


def _play(screen: Screen, play: Play) -> None:
    play.format()
    screen.section("A backup key")
    play.enroll()
    screen.section("Rotation")
    play.rotate()
    screen.section("A rotation that is killed on the way")
    before = play.crash()
    screen.section("Reconcile")
    play.reconcile(before)


def _interrupt(number: int, _: FrameType | None) -> None:
    """Clean up, and let nothing disturb that."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _why_no_loop_device() -> str:
    """The reason why the demo must do without; empty if it need not."""
    if os.geteuid() != 0:
        return "loop devices and a private bus need root"
    with tempfile.NamedTemporaryFile(prefix=PREFIX) as file:
        file.truncate(IMAGE_SIZE)
        try:
            LoopDevice(Path(file.name)).detach()
        except OSError as error:
            return f"loop devices cannot be had here: {error.strerror}"
    return ""


@contextmanager
def _on_loop_device(screen: Screen) -> Iterator[tuple[Commands, Way]]:
    screen.section("The set")
    has_udevd = Path("/run/udev/control").exists()
    with TestBed() as bed:
        directory = bed.dir / "demo"
        directory.mkdir()
        Path("/run/cryptsetup").mkdir(mode=0o700)
        udevd = "the machine's udevd" if has_udevd else "udevd"
        with screen.step(f"a system bus of its own, with real polkitd, {udevd} and journald"):
            commands = Commands(screen, directory)
            # Not "busctl status": it wants a cgroup file system, which a container may lack.
            bus = "org.freedesktop.DBus"
            asked = ("busctl", "call", bus, "/org/freedesktop/DBus", bus, "GetNameOwner", "s")
            commands.run(*asked, "org.freedesktop.PolicyKit1", quiet=True)
        try:
            with LoopDevice(_image(directory)) as loop:
                screen.say(f"The volume is {loop.path}, an image of {IMAGE_SIZE >> 20} MiB in memory.")
                yield commands, ThroughTheDaemon(screen, commands, bed, loop.path)
        finally:
            # The links in /dev are udevd's to remove, while it lives.
            commands.run("udevadm", "settle", f"--timeout={SETTLE_SECONDS}", status=None, quiet=True)


@contextmanager
def _on_image(screen: Screen, reason: str) -> Iterator[tuple[Commands, Way]]:
    screen.section("The set")
    screen.say(f"On an image file and without the daemon, with luksrotctl --direct: {reason}.")
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        commands = Commands(screen, Path(name))
        yield commands, WithoutDaemon(screen, commands, _image(Path(name)))


def _image(directory: Path) -> Path:
    image = directory / f"{PREFIX}disk.img"
    with image.open("wb") as file:
        file.truncate(IMAGE_SIZE)
    return image


if __name__ == "__main__":
    sys.exit(main())
