# SPDX-License-Identifier: GPL-2.0-or-later
"""What the code really asks of the kernel, seen by strace, is the sequence that the model assumes."""

import re
import subprocess
import sys

import pytest

from luksrotd.luks2.pair import parse_pair
from luksrotd.rotation.view import view
from tests.support.makeimage import KEY, make_image

#: A call that blocks while another thread makes one is printed in two parts; the first has all that is wanted here.
CALL = re.compile(r"(pwrite64|pwritev2?|write|fdatasync|fsync|ftruncate|fallocate|flock)\(\d+<([^>]*)>(.*)")
PWRITE = re.compile(r", (\d+), (\d+)( <unfinished|\))")
FLOCK = re.compile(r", (LOCK_[A-Z_|]+)")


@pytest.fixture
def traced(tmp_path):
    """Enrol, then rotate under strace: the images before and after, and the calls on the image."""
    image = make_image(tmp_path / "volume.img")
    for name, secret in {"main": KEY, "old": b"old", "new": b"new"}.items():
        (tmp_path / name).write_bytes(secret)
    verb = [sys.executable, "-P", "-m", "luksrotd.ctl", "--direct"]
    cost = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]

    def command(name: str, new: str) -> list[str]:
        keys = ["--key-file", str(tmp_path / "main"), "--new-keyfile", str(tmp_path / new)]
        return [*verb, name, str(image), *keys, *cost]

    subprocess.run(command("enroll", "old"), check=True, capture_output=True)
    before = image.read_bytes()
    log = tmp_path / "strace"
    trace = ["strace", "-f", "-y", "-s", "0", "-e", "trace=write,desc", "-o", str(log)]
    subprocess.run([*trace, *command("rotate", "new")], check=True, capture_output=True)
    return before, image.read_bytes(), _calls(log.read_text(), str(image))


def _calls(log: str, path: str) -> list[tuple[str, ...]]:
    calls = []
    for line in log.splitlines():
        match = CALL.search(line)
        if not match or match[2] != path:
            continue
        name, rest = match[1], match[3]
        if name == "pwrite64":
            size, offset, _ = PWRITE.search(rest).groups()
            calls.append(("write", offset, size))
        elif name == "flock":
            calls.append(("flock", FLOCK.match(rest)[1]))
        else:
            calls.append((name,))
    return calls


def test_the_kernel_sees_the_phases_each_with_its_flush(traced):
    before, after, calls = traced
    pair = parse_pair(before)
    old = view(pair).keys[0].keyslot.area
    new = view(parse_pair(after)).keys[0].keyslot.area
    size = str(pair.hdr_size)
    writes = [call[:2] for call in calls if call[0] == "write"]
    assert writes == [
        ("write", str(new.offset)),
        ("write", "0"),
        ("write", size),
        ("write", str(old.offset)),
        ("write", "0"),
        ("write", size),
    ]
    assert [call[0] for call in calls if call[0] != "flock"] == ["write", "fdatasync"] * 6
    sizes = [int(call[2]) for call in calls if call[0] == "write"]
    assert sizes[0] == new.size
    assert sizes[3] == old.size
    assert all(length <= 3 * 4096 for number, length in enumerate(sizes) if number not in (0, 3))


def test_it_writes_only_with_the_exclusive_metadata_lock_held(traced):
    _, _, calls = traced
    held = "no"
    for call in calls:
        if call[0] == "flock":
            held = {"LOCK_EX": "exclusively", "LOCK_SH": "shared", "LOCK_UN": "no"}[call[1].split("|")[0]]
        else:
            assert held == "exclusively"
    assert ("flock", "LOCK_SH|LOCK_NB") in calls, "the snapshot is taken under the shared lock"
