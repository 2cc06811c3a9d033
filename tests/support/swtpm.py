# SPDX-License-Identifier: GPL-2.0-or-later
"""A TPM 2.0 in software (swtpm) behind a character device, as a machine has one, and processes that see it as theirs.

The device is a terminal in raw mode with swtpm on its other side.  systemd's token plugin looks for the only TPM in
/sys/class/tpmrm, and then opens the node of that name in /dev.
"""

import os
import pty
import shlex
import stat
import subprocess
import sys
import tty
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: What libraries open beside the TPM.
_NODES: Final = ("null", "zero", "full", "random", "urandom")
#: For a process in a mount namespace of its own; then the program itself, in the same process.
_SCRIPT: Final = """#!/bin/sh
exec unshare --mount --propagation=private sh -c '
    mount --bind {device} {dev}/tpmrm0 && mount --bind {sysfs} /sys/class && mount --rbind {dev} /dev
    exec {python} "$@"
' sh "$@"
"""


@dataclass(frozen=True)
class SoftTpm:
    """``device``: the node.  ``python``: an interpreter for whose processes it is /dev/tpmrm0, the only TPM."""

    device: str
    python: str

    def enroll(self, image: Path, passphrase: bytes, *, pin: bytes | None = None) -> None:
        """``systemd-cryptenroll``: a keyslot and a token that need this TPM, and the PIN if there is one."""
        options = ["--tpm2-with-pin=yes"] if pin is not None else []
        argv = ["systemd-cryptenroll", f"--tpm2-device={self.device}", "--tpm2-pcrs=", *options, str(image)]
        secrets = {"PASSWORD": passphrase.decode(), "NEWPIN": (pin or b"").decode()}
        done = subprocess.run(argv, env={**os.environ, **secrets}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self.settle()

    def settle(self) -> None:
        """Drop what its last user has left in it, as the kernel does when a user closes /dev/tpmrm0."""
        for kind in ("--transient-object", "--loaded-session", "--saved-session"):
            subprocess.run(["tpm2_flushcontext", f"--tcti=device:{self.device}", kind], check=True)


@contextmanager
def soft_tpm(scratch: Path, group: int) -> Iterator[SoftTpm]:
    """Such a TPM, new; its device belongs to root and that group, as a real one does to ``tss``."""
    with ExitStack() as stack:
        master, slave = pty.openpty()
        stack.callback(os.close, slave)  # held open: swtpm must not see an end between two users
        tty.setraw(slave)
        device = os.ttyname(slave)
        os.chown(device, 0, group)
        os.chmod(device, 0o660)  # noqa: PTH101 - a node, not a file of ours
        state = scratch / "tpm-state"
        state.mkdir()
        argv = ["swtpm", "chardev", "--tpm2", "--tpmstate", f"dir={state}", "--fd", str(master)]
        with subprocess.Popen([*argv, "--flags", "not-need-init,startup-clear"], pass_fds=[master]) as process:
            stack.callback(process.kill)
            os.close(master)
            yield SoftTpm(device, str(_wrapper(stack, scratch, device)))
            stack.close()


def _wrapper(stack: ExitStack, scratch: Path, device: str) -> Path:
    sysfs, dev = scratch / "class", scratch / "dev"
    (sysfs / "tpmrm" / "tpmrm0").mkdir(parents=True)
    dev.mkdir()
    for directory in (scratch, sysfs, dev):
        directory.chmod(0o755)
    (dev / "tpmrm0").touch()
    for name in _NODES:
        os.mknod(dev / name, 0o666 | stat.S_IFCHR, os.stat(f"/dev/{name}").st_rdev)  # noqa: PTH116 - beside mknod
        (dev / name).chmod(0o666)
    wrapper = scratch / "python"
    python = shlex.quote(sys.executable)
    wrapper.write_text(_SCRIPT.format(device=device, sysfs=sysfs, dev=dev, python=python))
    wrapper.chmod(0o755)
    return wrapper
