# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs ``inside`` in a Debian in which luksrotd is installed, on that Debian's libcryptsetup, cryptsetup and Python."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from tests.powercut.inside import Result, Task
from tests.support.kernel import die_with_parent

TESTS: Final = Path(__file__).parents[1]
#: Where the tests and the recordings are, in the root.
_THERE: Final = "/srv/powercut"
#: In a mount namespace of its own: an overlay over the root, which nobody may write to; then be in it.
_ENTER: Final = """
set -eu
root=$1 scratch=$2 tests=$3
shift 3
mount -t tmpfs tmpfs "$scratch"
mkdir "$scratch/upper" "$scratch/work" "$scratch/root"
mount -t overlay -o "lowerdir=$root,upperdir=$scratch/upper,workdir=$scratch/work" overlay "$scratch/root"
new=$scratch/root
mount --rbind /dev "$new/dev"
mount --rbind /sys "$new/sys"
mount -t proc proc "$new/proc"
mount -t tmpfs -o mode=1777 tmpfs "$new/tmp"
mount -t tmpfs -o mode=0755 tmpfs "$new/run"
mkdir -p "$new/srv/powercut/tests" "$new/run/lock"
mount --bind "$tests" "$new/srv/powercut/tests"
cp "$1" "$new/srv/powercut/task.json"
shift
number=0
for folder in "$@"; do
    mkdir "$new/srv/powercut/$number"
    mount --bind "$folder" "$new/srv/powercut/$number"
    number=$((number + 1))
done
cd "$new"
# Not chroot: in the mount namespaces of one, /proc shows wrong paths.
pivot_root . .
umount --lazy .
exec env --ignore-environment PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C HOME=/root PYTHONPATH=/srv/powercut \\
    PYTHONDONTWRITEBYTECODE=1 /usr/bin/python3 -m tests.powercut.inside /srv/powercut/task.json
"""


def judge(root: Path, task: Task) -> Iterator[Result]:
    """Judge what ``task`` says in the Debian ``root``; raises ``RuntimeError`` if that breaks off."""
    moved = [f"{_THERE}/{number}" for number in range(len(task.folders))]
    with _running(root, replace(task, folders=moved), task.folders) as process:
        assert process.stdout is not None
        for line, folder in zip(process.stdout, task.folders, strict=False):
            found: dict[str, Any] = json.loads(line)
            yield Result(**{**found, "folder": folder})
        if process.wait():
            raise RuntimeError(f"judging in {root} ended with {process.returncode}")


@contextmanager
def _running(root: Path, task: Task, folders: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    with tempfile.TemporaryDirectory(prefix="luksrotd-powercut-") as scratch, tempfile.NamedTemporaryFile("w") as file:
        json.dump(asdict(task), file)
        file.flush()
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _ENTER, "sh", str(root), scratch]
        process = subprocess.Popen(
            [*command, str(TESTS), file.name, *folders],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env={"PATH": os.environ["PATH"]},
            preexec_fn=die_with_parent,  # noqa: PLW1509 - there are no threads
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
