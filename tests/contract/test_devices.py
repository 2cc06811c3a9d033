# SPDX-License-Identifier: GPL-2.0-or-later
"""``ports.Devices`` and ``ports.HeaderDevice``, on a disk in memory, a regular file and loop devices."""

import errno
import os
import random
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest

from luksrotd.errors import DeviceError, Internal, Outcome, UnknownDevice
from luksrotd.host.blockdev import BlockDevices
from luksrotd.ports import DeviceIdentity, DeviceRef
from tests.contract.conftest import loop_device, mounted, open_descriptors
from tests.support.simdisk import Flush, SimDevices, SimDisk, Write

MIB = 1024 * 1024
PATTERN = bytes(range(256)) * (MIB // 256)
REAL = ("file", "loop-512", "loop-4096")
KINDS = ("sim-512", "sim-4096", *REAL)
pytestmark = pytest.mark.usefixtures("no_leaked_descriptors")


@contextmanager
def bench(kind, tmp_path):
    """The opener, the path of a device of 1 MiB with PATTERN on it, and its sector size."""
    if kind.startswith("sim"):
        disk = SimDisk(PATTERN, path="/dev/sim0", sector_size=int(kind[4:]))
        yield SimDevices(disk), disk.path, disk.sector_size
        return
    image = tmp_path / "image"
    image.write_bytes(PATTERN)
    if kind == "file":
        yield BlockDevices(), str(image), 512
        return
    with loop_device(image, int(kind[5:])) as node:
        yield BlockDevices(), node, int(kind[5:])


@pytest.fixture(params=KINDS)
def made(request, tmp_path):
    with bench(request.param, tmp_path) as made:
        yield made


@pytest.fixture
def device(made):
    devices, path, _ = made
    device = devices.open(DeviceRef(path), writable=True)
    yield device
    device.close()


def test_it_says_what_it_is(made, device):
    _, path, sector_size = made
    assert (device.path, device.size, device.sector_size) == (path, MIB, sector_size)
    again = made[0].open(DeviceRef(path))
    assert again.identity == device.identity
    again.close()


def test_the_detached_header_is_what_gets_opened(made):
    devices, path, _ = made
    device = devices.open(DeviceRef("/nonexistent/data", path))
    assert device.path == path
    device.close()


@pytest.mark.parametrize(("offset", "length"), [(0, 512), (4096, 16384), (1, 3), (MIB - 1, 1), (0, MIB), (700, 0)])
@pytest.mark.parametrize("method", ["read", "read_medium"])
def test_reads_give_exactly_what_is_there(device, method, offset, length):
    assert getattr(device, method)(offset, length) == PATTERN[offset : offset + length]


@pytest.mark.parametrize("method", ["read", "read_medium"])
@pytest.mark.parametrize(("offset", "length"), [(MIB - 1, 2), (MIB, 1), (2 * MIB, 512), (-1, 1)])
def test_reading_past_the_end_is_an_error(device, method, offset, length):
    with pytest.raises(DeviceError, match=f"^cannot read {device.path} at {offset}: "):
        getattr(device, method)(offset, length)


def test_a_write_is_read_back_and_survives_reopening(made, device):
    devices, path, sector = made
    data = os.urandom(4096)
    device.write(8192, data)
    assert device.read(8192, 4096) == data
    device.flush()
    assert device.read_medium(8192, 4096) == data
    assert device.read(8192 - sector, sector) == PATTERN[8192 - sector : 8192]
    assert device.read(8192 + 4096, sector) == PATTERN[8192 + 4096 : 8192 + 4096 + sector]
    again = devices.open(DeviceRef(path))
    assert again.read(8192, 4096) == data
    again.close()


def test_single_sectors_can_be_written(device):
    device.write(device.size - device.sector_size, bytes(device.sector_size))
    device.flush()
    assert device.read_medium(device.size - device.sector_size, device.sector_size) == bytes(device.sector_size)


def test_a_write_that_is_not_whole_sectors_is_a_bug_and_does_nothing(device):
    for offset, length in ((device.sector_size // 2, device.sector_size), (0, device.sector_size - 1), (0, 1)):
        with pytest.raises(Internal, match="cannot write"):
            device.write(offset, bytes(length))
    assert device.read(0, device.sector_size * 2) == PATTERN[: device.sector_size * 2]
    device.write(0, bytes(device.sector_size))  # and is not held against the device
    device.flush()


def test_a_write_never_makes_it_longer(made, device):
    with pytest.raises(DeviceError, match="cannot write"):
        device.write(MIB, bytes(device.sector_size))
    again = made[0].open(DeviceRef(made[1]))
    assert again.size == MIB
    again.close()


def test_opened_for_reading_it_is_not_written(made):
    devices, path, sector = made
    device = devices.open(DeviceRef(path))
    with pytest.raises(DeviceError, match="opened for reading only"):
        device.write(0, bytes(sector))
    with pytest.raises(DeviceError, match="opened for reading only"):
        device.flush()
    assert device.read_medium(0, sector) == PATTERN[:sector]
    device.close()


def test_closing_twice_is_fine_and_using_it_afterwards_an_error(device):
    device.close()
    device.close()
    for use in (
        lambda: device.read(0, 1),
        lambda: device.read_medium(0, 1),
        lambda: device.write(0, bytes(4096)),
        device.flush,
    ):
        with pytest.raises(DeviceError, match="closed"):
            use()


@pytest.mark.parametrize("devices", [SimDevices(), BlockDevices()], ids=["sim", "real"])
def test_what_is_not_there_is_unknown(devices):
    with pytest.raises(UnknownDevice, match=r"^cannot open /nonexistent/x: ") as raised:
        devices.open(DeviceRef("/nonexistent/x"))
    assert raised.value.outcome is Outcome.UNCHANGED


# -- only the real ones ------------------------------------------------------------------------------------------


def test_other_kinds_of_files_are_refused_without_opening_them(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (tmp_path, fifo, "/dev/null", "/dev/loop-control", loop, f"{fifo}/x", "", "a\0b", "x" * 5000):
        with pytest.raises(UnknownDevice, match=r"^cannot open "):
            BlockDevices().open(DeviceRef(str(path)), writable=True)


def test_symbolic_links_are_followed_and_descriptors_not_inherited(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(PATTERN)
    link = tmp_path / "link"
    link.symlink_to(image)
    device = BlockDevices().open(DeviceRef(str(link)))
    (fd,) = (fd for fd, leads_to in open_descriptors().items() if leads_to == str(image))
    assert not os.get_inheritable(fd)
    status = image.stat()
    assert device.identity == DeviceIdentity(False, os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    device.close()


def test_a_read_only_device_cannot_be_opened_for_writing(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(PATTERN)
    with loop_device(image, options=["--read-only"]) as node:
        with pytest.raises(DeviceError, match=rf"^cannot open {node}: Read-only"):
            BlockDevices().open(DeviceRef(node), writable=True)
        device = BlockDevices().open(DeviceRef(node))
        assert device.read(0, 512) == PATTERN[:512]
        device.close()


@pytest.mark.parametrize("sector", [512, 4096])
def test_read_medium_does_not_believe_the_page_cache(tmp_path, sector):
    """The backing file is changed under the loop device: only a read past the cache can see it."""
    image = tmp_path / "image"
    image.write_bytes(PATTERN)
    with loop_device(image, sector) as node:
        device = BlockDevices().open(DeviceRef(node))
        assert device.read(0, 8192) == PATTERN[:8192]
        with image.open("r+b") as file:
            file.write(b"\xee" * 4096)
        assert device.read(0, 4096) == PATTERN[:4096]
        assert device.read_medium(0, 8192) == b"\xee" * 4096 + PATTERN[4096:8192]
        device.close()


def test_read_medium_makes_the_page_cache_forget(tmp_path):
    """Where the medium has other bytes than the page cache, every reader sees them from then on."""
    image = tmp_path / "image"
    image.write_bytes(PATTERN)
    with loop_device(image) as node:
        device, other = BlockDevices().open(DeviceRef(node)), BlockDevices().open(DeviceRef(node))
        assert other.read(0, 8192) == PATTERN[:8192]
        with image.open("r+b") as file:
            file.write(b"\xee" * 8192)
        assert other.read(0, 8192) == PATTERN[:8192]
        assert device.read_medium(0, 4096) == b"\xee" * 4096
        assert other.read(0, 8192) == b"\xee" * 4096 + PATTERN[4096:8192]
        device.close()
        other.close()


@pytest.mark.parametrize("loop", [False, True], ids=["file", "loop"])
def test_read_medium_reaches_an_end_that_is_not_aligned(tmp_path, loop):
    image = tmp_path / "image"
    image.write_bytes(PATTERN + b"e" * 512)
    with loop_device(image) if loop else nullcontext(str(image)) as path:
        device = BlockDevices().open(DeviceRef(path))
        assert device.read_medium(MIB - 4096, 4608) == PATTERN[-4096:] + b"e" * 512
        assert device.read_medium(MIB + 511, 1) == b"e"
        device.close()


def test_read_medium_of_what_has_been_cut_off(tmp_path):
    """What an earlier read has left in the buffer is not what is there now."""
    image = tmp_path / "image"
    image.write_bytes(PATTERN)
    device = BlockDevices().open(DeviceRef(str(image)))
    assert device.read_medium(0, 16384) == PATTERN[:16384]
    os.truncate(image, 8192)
    for offset in (0, 4608, 12288):
        with pytest.raises(DeviceError, match=rf"^cannot read {image} at {max(offset, 8192)}: unexpected end$"):
            device.read_medium(offset, 4096 * 3)
    assert device.read_medium(512, 1024) == PATTERN[512:1536]
    device.close()


def test_read_medium_by_several_threads(tmp_path):
    image = tmp_path / "image"
    content = random.Random(1).randbytes(MIB)
    image.write_bytes(content)
    device = BlockDevices().open(DeviceRef(str(image)))

    def reads(number):
        part = slice(number * MIB // 8, (number + 1) * MIB // 8)
        return all(device.read_medium(part.start, MIB // 8) == content[part] for _ in range(50))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(reads, range(8)))
    device.close()


def test_read_medium_where_there_is_no_o_direct(tmp_path):
    with mounted("ramfs", tmp_path / "ram", "mode=700") as ram:
        image = ram / "image"
        image.write_bytes(PATTERN)
        with pytest.raises(OSError, match="Invalid argument"):
            os.open(image, os.O_RDONLY | os.O_DIRECT)
        device = BlockDevices().open(DeviceRef(str(image)), writable=True)
        device.write(0, bytes(512))
        assert device.read_medium(1, 1000) == bytes(511) + PATTERN[512:1001]
        device.close()


def test_a_device_that_shrank_under_us_is_an_error_that_says_where(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(PATTERN)
    with loop_device(image) as node:
        for path in (str(image), node):
            device = BlockDevices().open(DeviceRef(path), writable=True)
            os.truncate(image, MIB // 2)
            for method in (device.read, device.read_medium):
                with pytest.raises(DeviceError, match=rf"^cannot read {path} at \d+: (?!.*None)"):
                    method(MIB // 2 - 4096, 65536)
            device.close()
            image.write_bytes(PATTERN)


def test_after_a_failed_flush_nothing_is_written_or_flushed_again(tmp_path):
    """A loop device over a full file system: writes reach the page cache, and the flush cannot put them anywhere."""
    with mounted("tmpfs", tmp_path / "small", "size=256k") as small:
        image = small / "image"
        image.touch()
        os.truncate(image, MIB)
        with loop_device(image) as node:
            device = BlockDevices().open(DeviceRef(node), writable=True)
            device.write(0, PATTERN)
            with pytest.raises(DeviceError, match=rf"^cannot flush {node}: "):
                device.flush()
            os.truncate(image, 0)  # now there is room: a second fdatasync would succeed
            os.truncate(image, MIB)
            with pytest.raises(DeviceError, match=r"failed before: "):
                device.flush()
            with pytest.raises(DeviceError, match=r"failed before: "):
                device.write(0, bytes(512))
            assert device.read_medium(0, 4096) == bytes(4096)  # and one can still look
            device.close()


def test_a_write_without_room_and_a_short_write_are_errors_that_last(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(PATTERN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, reason in ((8192, "File too large"), (8192 + 512, "short write, 512 of 1024 bytes")):
        device = BlockDevices().open(DeviceRef(str(image)), writable=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(DeviceError, match=rf"^cannot write {image} at 8192: {reason}"):
                device.write(8192, bytes(1024))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        with pytest.raises(DeviceError, match="failed before"):
            device.flush()
        with pytest.raises(DeviceError, match="failed before"):
            device.write(0, bytes(512))
        device.close()


# -- only the simulated one --------------------------------------------------------------------------------------


@pytest.fixture
def disk():
    return SimDisk(bytes(64 * 1024))


def open_sim(disk):
    return SimDevices(disk).open(DeviceRef(disk.path), writable=True)


def test_the_log_has_epochs(disk):
    device = open_sim(disk)
    device.write(0, b"a" * 512)
    device.write(512, b"b" * 512)
    device.flush()
    device.write(0, b"c" * 512)
    assert disk.log == [Write(0, b"a" * 512), Write(512, b"b" * 512), Flush(), Write(0, b"c" * 512)]
    assert disk.epochs() == [disk.log[:2], disk.log[3:]]
    assert disk.dirty == (disk.log[3],)
    assert (disk.content[:512], bytes(disk.durable[:512])) == (b"c" * 512, b"a" * 512)
    disk.power_cut()
    assert device.read(0, 1024) == b"a" * 512 + b"b" * 512


@pytest.mark.parametrize(("landed", "medium"), [(None, b"ab"), (0, b"\0\0"), (1, b"a\0")])
def test_a_failed_flush_leaves_on_the_medium_what_the_fault_says(disk, landed, medium):
    device = open_sim(disk)
    disk.faults.flushes[0] = landed
    device.write(0, b"a" * 512)
    device.write(512, b"b" * 512)
    with pytest.raises(DeviceError, match="cannot flush"):
        device.flush()
    with pytest.raises(DeviceError, match="failed before"):
        device.flush()
    with pytest.raises(DeviceError, match="failed before"):
        device.write(0, bytes(512))
    assert device.read(0, 1024) == b"a" * 512 + b"b" * 512
    assert device.read_medium(0, 1024) == medium[:1] * 512 + medium[1:] * 512
    open_sim(disk).flush()  # another descriptor succeeds, and it means nothing
    assert device.read_medium(0, 1024) == medium[:1] * 512 + medium[1:] * 512


def test_a_failed_flush_may_tear_a_write(disk):
    device = open_sim(disk)
    disk.faults.flushes[0] = 1
    disk.faults.torn = 1
    for offset, content in ((0, b"a"), (1024, b"b"), (4096, b"c")):
        device.write(offset, content * 1024)
    with pytest.raises(DeviceError, match="cannot flush"):
        device.flush()
    assert disk.medium()[:2048] == b"a" * 1024 + b"b" * 512 + bytes(512)
    assert disk.medium()[4096:5120] == bytes(1024)


def test_the_error_is_the_one_that_was_asked_for(disk):
    disk.faults.error = errno.ENOSPC
    disk.faults.writes[0] = 0
    with pytest.raises(DeviceError, match="No space left on device"):
        open_sim(disk).write(0, bytes(512))
    disk.faults.flushes[0] = 0
    with pytest.raises(DeviceError, match="No space left on device"):
        open_sim(disk).flush()


def test_read_medium_makes_the_simulated_page_cache_forget(disk):
    device = open_sim(disk)
    disk.faults.flushes[0] = 0
    device.write(0, b"a" * 1024)
    with pytest.raises(DeviceError):
        device.flush()
    assert device.read(0, 1024) == b"a" * 1024
    assert device.read_medium(0, 512) == bytes(512)
    assert device.read(0, 1024) == bytes(512) + b"a" * 512


@pytest.mark.parametrize(("arrived", "reason"), [(0, "Input/output error"), (512, "short write")])
def test_a_failed_write(disk, arrived, reason):
    device = open_sim(disk)
    disk.faults.writes[1] = arrived
    device.write(4096, b"a" * 1024)
    with pytest.raises(DeviceError, match=f"^cannot write {disk.path} at 0: {reason}"):
        device.write(0, b"b" * 1024)
    assert device.read(0, 1024) == b"b" * arrived + bytes(1024 - arrived)
    with pytest.raises(DeviceError, match="failed before"):
        device.flush()


def test_a_device_that_is_gone(disk):
    device = open_sim(disk)
    disk.faults.gone = True
    for use in (lambda: device.read(0, 1), lambda: device.read_medium(0, 1), lambda: device.write(0, bytes(512))):
        with pytest.raises(DeviceError, match="No such device"):
            use()
    with pytest.raises(UnknownDevice):
        open_sim(disk)


def test_a_device_goes_right_before_a_write(disk):
    disk.faults.gone_at_write = 1
    device = open_sim(disk)
    device.write(0, b"a" * 512)
    device.flush()
    for use in (lambda: device.write(512, b"b" * 512), device.flush):
        with pytest.raises(DeviceError, match="No such device"):
            use()
    assert disk.attempts == 4
    disk.power_cut()
    assert disk.content[:1024] == b"a" * 512 + bytes(512)


def test_a_device_goes_right_before_a_flush(disk):
    disk.faults.gone_at_flush = 0
    device = open_sim(disk)
    device.write(0, b"a" * 512)
    with pytest.raises(DeviceError, match="No such device"):
        device.flush()
    disk.power_cut()
    assert disk.content[:512] == bytes(512)


def test_of_what_was_not_flushed_a_power_cut_may_leave_some(disk):
    device = open_sim(disk)
    for offset in (0, 512, 1024):
        device.write(offset, b"a" * 512)
    disk.power_cut(landed=2)
    assert device.read(0, 1536) == b"a" * 1024 + bytes(512)


def test_the_observer_sees_it_before_it_happens(disk):
    seen = []
    disk.observer = lambda operation: seen.append((operation, disk.content[:1]))
    device = open_sim(disk)
    device.write(0, b"a" * 512)
    device.flush()
    assert seen == [(Write(0, b"a" * 512), b"\0"), (Flush(), b"a")]


def test_leaked_devices_are_told(disk):
    devices = SimDevices(disk)
    one, two = devices.open(DeviceRef(disk.path)), devices.open(DeviceRef(disk.path))
    one.close()
    assert devices.leaked == (two,)
