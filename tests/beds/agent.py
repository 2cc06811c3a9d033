# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs in a virtual machine, by Debian's Python alone, and does what the host asks for on a virtio-serial port.

Both sides send lines of JSON; bytes are base64 in them.  One request at a time:

    → {"script": "…", "files": {"name": bytes}, "environment": {…}}      a bash script, in a new folder with these files
    ← {"output": bytes}                                                  as it comes; then
    ← {"status": 0}
    → {"wake": {"now": seconds, "seed": bytes}}                         the clock, and fresh random numbers
    ← {"status": 0}

With its first line, ``{"ready": …}``, it says that it is there, after a boot.  What a script leaves in the background
does not hold up its end, and its later output is lost.
"""

import base64
import fcntl
import json
import os
import select
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PORT = "/dev/virtio-ports/luksrotd.bed"
FOLDERS = "/run/bed"

# linux/random.h
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207


def main() -> None:
    """Serve until the machine stops."""
    port = os.open(PORT, os.O_RDWR | os.O_CLOEXEC)
    Path(FOLDERS).mkdir(exist_ok=True)
    _send(port, {"ready": Path("/proc/uptime").read_text().split()[0]})
    for line in _lines(port):
        request = json.loads(line)
        if "wake" in request:
            _wake(**request["wake"])
            _send(port, {"status": 0})
        else:
            _send(port, {"status": _run(port, **request)})


def _lines(port: int) -> Iterator[bytes]:
    kept = b""
    while True:
        chunk = os.read(port, 1 << 16)
        if not chunk:  # nobody is connected at the other end, as for a moment after a restore
            time.sleep(0.01)
            continue
        *lines, kept = (kept + chunk).split(b"\n")
        yield from lines


def _send(port: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(port, data) :]


def _wake(now: float, seed: str) -> None:
    """Set the clock; without fresh entropy every machine of one saved state would choose the same keys."""
    time.clock_settime(time.CLOCK_REALTIME, now)
    data = base64.b64decode(seed)
    with Path("/dev/urandom").open("wb", buffering=0) as pool:
        fcntl.ioctl(pool, RNDADDENTROPY, struct.pack("ii", len(data) * 8, len(data)) + data)
        fcntl.ioctl(pool, RNDRESEEDCRNG)


def _run(port: int, script: str, files: dict[str, str], environment: dict[str, str]) -> int:
    folder = tempfile.mkdtemp(dir=FOLDERS)
    for name, content in files.items():
        path = Path(folder, name)
        path.touch(0o600)
        path.write_bytes(base64.b64decode(content))
    reader, writer = os.pipe()
    with subprocess.Popen(
        ["/bin/bash", "-c", script],
        cwd=folder,
        env={**os.environ, "HOME": "/root", "LANG": "C.UTF-8", **environment},
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=writer,
    ) as process:
        os.close(writer)
        os.set_blocking(reader, False)
        ended = os.pidfd_open(process.pid)
        waiting_for = [ended, reader]
        while ended not in (ready := _ready(waiting_for)):
            if reader in ready and not _pass_on(port, reader):
                waiting_for.remove(reader)
        _pass_on(port, reader)
        os.close(ended)
        os.close(reader)
        return process.wait()


def _ready(descriptors: list[int]) -> list[int]:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll()]


def _pass_on(port: int, reader: int) -> bool:
    """What is there to be read now; False at the end of the stream."""
    try:
        while chunk := os.read(reader, 1 << 16):
            _send(port, {"output": base64.b64encode(chunk).decode()})
    except BlockingIOError:
        return True
    return False


if __name__ == "__main__":
    main()
