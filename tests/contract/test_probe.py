# SPDX-License-Identifier: GPL-2.0-or-later
"""``ports.SignatureProbe``, simulated and with wipefs(8)."""

import asyncio
import os
import threading
from contextlib import contextmanager

import pytest

from luksrotd.errors import DeviceError
from luksrotd.host import probe
from luksrotd.host.blockdev import BlockDevices
from luksrotd.host.probe import WipefsProbe
from luksrotd.ports import DeviceRef
from tests.contract.conftest import loop_device, run
from tests.support.simdisk import SimDevice, SimDisk
from tests.support.simhost import SimProbe

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("no_leaked_descriptors")]
MDADM = b"Intel Raid ISM Cfg Sig. 1.1.00"


class SimBench:
    def __init__(self):
        self.device = SimDevice(SimDisk(bytes(4096)))
        self.probe = SimProbe()

    def plant_raid(self):
        self.probe.planted[self.device.path] = ("isw_raid_member",)

    def break_it(self):
        self.probe.broken = True


class RealBench:
    def __init__(self, device, image):
        self.device = device
        self.probe = WipefsProbe()
        self._image = image

    def plant_raid(self):
        """In the last KiB, where libblkid looks for Intel's metadata (found to stop libcryptsetup's recovery)."""
        device = BlockDevices().open(DeviceRef(self.device.path), writable=True)
        device.write(device.size - 1024, MDADM.ljust(512, b"\0"))
        device.flush()
        device.close()

    def break_it(self):
        self.device.close()
        self._image.rename(self._image.with_suffix(".gone"))
        self.device = _Named(str(self._image), self.device.identity)


class _Named:
    def __init__(self, path, identity):
        self.path, self.identity = path, identity


@contextmanager
def opened(path):
    device = BlockDevices().open(DeviceRef(str(path)))
    try:
        yield device
    finally:
        device.close()


@pytest.fixture(params=["sim", "file", "loop"])
def bench(request, luks2_image):
    if request.param == "sim":
        yield SimBench()
    elif request.param == "file":
        with opened(luks2_image) as device:
            yield RealBench(device, luks2_image)
    else:
        with loop_device(luks2_image) as node, opened(node) as device:
            yield RealBench(device, luks2_image)


async def test_a_luks2_device_has_nothing_foreign(bench):
    assert tuple(await bench.probe.foreign(bench.device)) == ()


async def test_another_signature_is_foreign(bench):
    bench.plant_raid()
    assert tuple(await bench.probe.foreign(bench.device)) == ("isw_raid_member",)


async def test_a_probe_that_fails_is_a_device_error(bench, request):
    if "loop" in request.node.name:  # the node of a loop device cannot be taken away; see the replaced one below
        bench = RealBench(_Named("/dev/nonexistent", bench.device.identity), None)
    else:
        bench.break_it()
    with pytest.raises(DeviceError, match=r"^cannot probe "):
        await bench.probe.foreign(bench.device)


async def test_all_are_clear_if_none_has_another_signature(bench):
    assert await bench.probe.all_clear([bench.device])
    assert await bench.probe.all_clear([bench.device, bench.device])
    bench.plant_raid()
    assert not await bench.probe.all_clear([bench.device])


async def test_none_is_clear_if_that_cannot_be_told(bench, request):
    if "loop" in request.node.name:
        bench = RealBench(_Named("/dev/nonexistent", bench.device.identity), None)
    else:
        bench.break_it()
    assert not await bench.probe.all_clear([bench.device])


# -- only the real one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["primary", "secondary", "both"])
async def test_a_broken_copy_is_not_foreign(luks2_image, broken):
    with luks2_image.open("r+b") as file:
        for offset in {"primary": (0,), "secondary": (16384,), "both": (0, 16384)}[broken]:
            file.seek(offset)
            file.write(bytes(512))
    with opened(luks2_image) as device:
        assert tuple(await WipefsProbe().foreign(device)) == ()


async def test_several_signatures_are_each_named_once(tmp_path):
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 * 1024 * 1024)
    run("sfdisk", "--quiet", str(image), data=b"label: gpt\nsize=4MiB\n")
    with opened(image) as device:  # GPT has two headers
        assert sorted(await WipefsProbe().foreign(device)) == ["PMBR", "gpt"]


async def test_a_name_that_leads_elsewhere_by_now_is_refused(luks2_image):
    with opened(luks2_image) as device:
        luks2_image.rename(luks2_image.with_suffix(".moved"))
        luks2_image.write_bytes(bytes(4096))
        with pytest.raises(DeviceError, match="replaced"):
            await WipefsProbe().foreign(device)


def tool(tmp_path, script):
    path = tmp_path / "tool"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("echo oh no >&2; exit 1", "oh no"),
        ("exit 3", "ended with 3"),
        ("kill -9 $$", "ended with -9"),
        ("echo '[]'", "not understood"),
        ("echo '{\"signatures\": [{}]}'", "not understood"),
        ("echo nonsense", "not understood"),
        ("exec yes", "says too much"),
        ("exec yes >&2", "says too much"),
    ],
)
async def test_a_tool_that_misbehaves_is_a_device_error(luks2_image, tmp_path, script, complaint):
    complaint = rf"^cannot probe {luks2_image}: .*{complaint}"
    with opened(luks2_image) as device, pytest.raises(DeviceError, match=complaint):
        await WipefsProbe(command=tool(tmp_path, script)).foreign(device)


async def test_a_tool_that_is_not_installed_is_a_device_error(luks2_image):
    with opened(luks2_image) as device, pytest.raises(DeviceError, match="cannot run wipefs-nonexistent"):
        await WipefsProbe(command="wipefs-nonexistent").foreign(device)


async def test_a_tool_that_finds_nothing_may_say_nothing(luks2_image, tmp_path):
    with opened(luks2_image) as device:
        assert tuple(await WipefsProbe(command=tool(tmp_path, "exit 0")).foreign(device)) == ()


async def test_a_tool_that_hangs_is_killed(luks2_image, tmp_path):
    probe = WipefsProbe(command=tool(tmp_path, "exec sleep 1000"), timeout=0.1)
    with opened(luks2_image) as device, pytest.raises(DeviceError, match="does not end"):
        await probe.foreign(device)


async def test_one_tool_looks_at_all_devices(luks2_image, tmp_path):
    told = tmp_path / "told"
    other = tmp_path / "other"
    other.write_bytes(luks2_image.read_bytes())
    counting = tool(tmp_path, f'echo "$@" >>{told}; exec wipefs "$@"')
    with opened(luks2_image) as first, opened(other) as second:
        assert await WipefsProbe(command=counting).all_clear([first, second])
        (line,) = told.read_text().splitlines()
        assert line.count("/proc/self/fd/") == 2
        with other.open("r+b") as file:
            file.seek(-1024, 2)
            file.write(MDADM)
        assert not await WipefsProbe(command=counting).all_clear([first, second])


@pytest.mark.parametrize("script", ["exit 1", "echo nonsense", "exec sleep 1000", "exec yes"])
async def test_a_tool_that_fails_says_nothing_of_any(luks2_image, tmp_path, script):
    with opened(luks2_image) as device:
        probe = WipefsProbe(command=tool(tmp_path, script), timeout=0.1 if "sleep" in script else 20.0)
        assert not await probe.all_clear([device, device])
        assert not await probe.all_clear([device, _Named("/dev/nonexistent", device.identity)])


async def test_a_device_that_cannot_be_opened_soon_holds_up_no_other(luks2_image, monkeypatch):
    answers, closed = threading.Event(), asyncio.Event()
    opens, closes = probe._open_same, probe._close

    def late(device):
        assert answers.wait(60)
        return opens(device)

    def noted(opening):
        closes(opening)
        closed.set()

    monkeypatch.setattr(probe, "_open_same", late)
    monkeypatch.setattr(probe, "_close", noted)
    with opened(luks2_image) as device:
        assert not await WipefsProbe(timeout=0.1).all_clear([device])
        answers.set()
        async with asyncio.timeout(60):
            await closed.wait()


async def test_cancelling_kills_the_tool(luks2_image, tmp_path):
    told = tmp_path / "pid"
    os.mkfifo(told)
    hanging = tool(tmp_path, f"echo $$ >{told}; exec sleep 1000")
    with opened(luks2_image) as device:
        task = asyncio.create_task(WipefsProbe(command=hanging).foreign(device))
        pid = await asyncio.to_thread(told.read_text)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


async def test_it_sees_neither_our_environment_nor_our_descriptors(luks2_image, tmp_path, monkeypatch):
    monkeypatch.setenv("LIBBLKID_DEBUG", "all")
    seen = tmp_path / "seen"
    spy = tool(tmp_path, f'env >{seen}; ls /proc/self/fd | wc -l >>{seen}; echo "$@" >>{seen}')
    with opened(luks2_image) as device, luks2_image.open() as other:
        assert not other.closed
        await WipefsProbe(command=spy).foreign(device)
    lines = seen.read_text().splitlines()
    assert {line.split("=")[0] for line in lines[:-2]} <= {"PATH", "LC_ALL", "PWD", "SHLVL", "_"}
    assert int(lines[-2]) == 5  # standard ones, ours, and the one of ls
    assert lines[-1].startswith("--no-act --json /proc/self/fd/")
