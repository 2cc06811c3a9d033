# SPDX-License-Identifier: GPL-2.0-or-later
"""The recorder sees every write and flush of a command; ``record`` itself compares the replay with the result."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.crash import Enumeration
from tests.support.makeimage import KEY, PBKDF, make_image
from tests.support.recorder import record, replay

MIB = 1024 * 1024
HDR = 16384


@pytest.fixture
def image(tmp_path):
    return make_image(tmp_path / "volume.img", keyslots_size=2 * MIB, size=4 * MIB)


def places(recording):
    return [[(write.offset, len(write.data)) for write in epoch] for epoch in recording.epochs]


def header(offset):
    return [(offset, 4096), (offset + 4096, HDR - 4096), (offset, 4096)]


def script(image, body):
    """A Python program with the image open as ``fd``."""
    return [sys.executable, "-c", f"import os, threading\nfd = os.open({str(image)!r}, os.O_RDWR)\n{body}"]


def test_cryptsetup_adds_a_key_in_three_epochs(image, tmp_path):
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "new").write_bytes(b"new")
    command = ["cryptsetup", "-q", "luksAddKey", "--key-file", str(tmp_path / "key"), *PBKDF]
    recording = record([*command, str(image), str(tmp_path / "new")], image)
    assert recording.status == 0
    area, *headers = places(recording)
    assert sum(length for _, length in area) == 258048
    assert headers == [header(0), header(HDR), []]
    assert replay(recording.before, recording.writes) == recording.after == image.read_bytes()
    assert recording.before != recording.after


def test_cryptsetup_sets_a_token_in_two_epochs(image):
    token = json.dumps({"type": "x", "keyslots": ["0"]}).encode()
    recording = record(["cryptsetup", "token", "import", "--token-id", "0", str(image)], image, stdin=token)
    assert places(recording) == [header(0), header(HDR), []]


def test_cryptenroll_is_seen_though_it_loads_libcryptsetup_itself(image):
    command = ["systemd-cryptenroll", "--recovery-key", str(image)]
    recording = record(command, image, environment={"PASSWORD": KEY.decode()})
    assert recording.status == 0, recording.stderr
    assert places(recording)[1:] == [header(0), header(HDR), header(0), header(HDR), []]


def test_what_was_recorded_can_be_enumerated(image):
    token = json.dumps({"type": "x", "keyslots": ["0"]}).encode()
    recording = record(["cryptsetup", "token", "import", "--token-id", "0", str(image)], image, stdin=token)
    enumeration = Enumeration(recording.before, recording.epochs[:-1], 2 * HDR)
    assert enumeration.final == recording.after
    assert len(list(enumeration.images())) > 2


def test_offsets_follow_duplicates_children_threads_reads_and_seeks(image):
    body = """
os.lseek(fd, 512, os.SEEK_SET); os.write(fd, b"a" * 512)
copy = os.dup(fd); os.write(copy, b"b" * 512)
if not os.fork():
    os.write(fd, b"c" * 512); os._exit(0)
os.wait()
os.read(fd, 512); os.lseek(copy, -256, os.SEEK_CUR)
thread = threading.Thread(target=lambda: os.write(fd, b"d" * 512)); thread.start(); thread.join()
os.close(copy); os.fsync(fd)
os.writev(fd, [b"e" * 256, b"f" * 256])
again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR); os.write(again, b"g" * 512)
os.pwrite(fd, b"h" * 512, 8192); os.pwritev(fd, [b"i" * 256, b"j" * 256], 16384)
os.fdatasync(again)
"""
    recording = record(script(image, body), image)
    assert recording.status == 0, recording.stderr
    assert [[(write.offset, write.data[:1]) for write in epoch] for epoch in recording.epochs] == [
        [(512, b"a"), (1024, b"b"), (1536, b"c"), (2304, b"d")],
        [(2816, b"e"), (0, b"g"), (8192, b"h"), (16384, b"i")],
        [],
    ]
    assert recording.epochs[1][0].data == b"e" * 256 + b"f" * 256


def test_only_a_flush_ends_an_epoch(image):
    body = """
os.pwrite(fd, b"a" * 512, 0); os.sync()
os.close(fd); fd = os.open("/proc/self/fd/0", os.O_RDONLY)
"""
    recording = record(script(image, body), image)
    assert [len(epoch) for epoch in recording.epochs] == [1]


def test_a_synchronous_write_is_an_epoch(image):
    body = f"""
fd = os.open({str(image)!r}, os.O_RDWR | os.O_DSYNC)
os.write(fd, b"a" * 512); os.write(fd, b"b" * 512)
"""
    assert [len(epoch) for epoch in record(script(image, body), image).epochs] == [1, 1, 0]


def test_other_files_are_not_recorded(image, tmp_path):
    other = tmp_path / "other"
    body = f"""
fd = os.open({str(other)!r}, os.O_RDWR | os.O_CREAT)
os.write(fd, b"a" * 512); os.fsync(fd)
"""
    assert record(script(image, body), image).epochs == [[]]
    assert other.read_bytes() == b"a" * 512


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("import mmap\nmmap.mmap(fd, 4096)[0:1] = b'x'", id="a shared mapping"),
        pytest.param("os.truncate(fd, os.fstat(fd).st_size)", id="truncation"),
        pytest.param("os.posix_fallocate(fd, 0, 4096)", id="allocation"),
    ],
)
def test_what_cannot_be_followed_is_refused(image, body):
    with pytest.raises(AssertionError, match="cannot follow"):
        record(script(image, body), image)


def test_a_write_that_was_not_seen_is_noticed(image, tmp_path):
    """By the comparison at the end: here this process writes while the command waits for it."""
    ask, answer = tmp_path / "ask", tmp_path / "answer"
    os.mkfifo(ask)
    os.mkfifo(answer)

    def write_behind_its_back():
        ask.read_bytes()
        with image.open("r+b") as file:
            file.write(b"x")
        answer.write_bytes(b"done")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(write_behind_its_back)
        with pytest.raises(AssertionError, match="not all seen"):
            record(["sh", "-c", f"echo >{ask}; cat {answer}"], image)
