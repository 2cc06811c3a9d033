# SPDX-License-Identifier: GPL-2.0-or-later
"""The registry: volumes that come, change, go, and show themselves twice."""

import asyncio
import gc
from types import FunctionType, ModuleType, SimpleNamespace

import pytest

from luksrotd.config import DeviceRules, Rule
from luksrotd.errors import DeviceError, NeedsPerson, Outcome, UnknownDevice
from luksrotd.ports import DeviceRef, Traits
from luksrotd.rotation.ledger import ForeignChange
from luksrotd.service.registry import Registry
from tests.service.world import BACKUP, NEXT, NODE, OLD, OTHER_UUID, UUID, World
from tests.support import forge
from tests.support.simdisk import SimDisk
from tests.support.simengine import make_volume
from tests.support.simhost import SimWatcher
from tests.support.simlocks import Level

pytestmark = pytest.mark.asyncio


class Seen:
    """An observer that can be waited on."""

    def __init__(self):
        self.lines = []
        self._more = asyncio.Event()

    def volume_added(self, volume):
        self._note(f"added {volume.nodes[0]}")

    def volume_changed(self, volume, *, fresh):
        self._note(f"{'fresh' if fresh else 'changed'} {' '.join(volume.nodes)}")

    def volume_removed(self, volume):
        self._note("removed")

    async def until(self, line):
        """Wait for that line, and forget everything up to it."""
        while line not in self.lines:
            self._more.clear()
            await self._more.wait()
        del self.lines[: self.lines.index(line) + 1]

    def _note(self, line):
        self.lines.append(line)
        self._more.set()


@pytest.fixture
def world():
    world = World()
    world.seen = Seen()
    world.registry.observe(world.seen)
    return world


async def test_what_is_there_at_the_start_is_there_after_the_scan(world):
    async with world.running():
        assert list(world.registry.volumes) == [UUID]
        assert world.seen.lines == [f"added {NODE}", f"fresh {NODE}"]
        assert world.registry.find(UUID.upper()) is world.registry.find(NODE) is world.registry.get(UUID)
        for unknown in (OTHER_UUID, "/dev/nowhere", "", NODE + "/"):
            with pytest.raises(UnknownDevice):
                world.registry.find(unknown)


def reachable(start):
    """All that is kept as long as that is; no further than the code and the types of it."""
    found, left = {}, [start]
    while left:
        one = left.pop()
        if id(one) not in found and not isinstance(one, type | ModuleType | FunctionType):
            found[id(one)] = one
            left += gc.get_referents(one)
    return found.values()


async def test_the_bytes_of_a_header_are_not_kept(world):
    """Of each volume they may be 16 MiB."""
    async with world.running():
        volume = world.registry.get(UUID)
        assert volume.view == world.view.summary
        assert any(one is volume.view.metadata for one in reachable(volume))
        assert sum(len(one) for one in reachable(volume) if isinstance(one, bytes)) < 1024


async def test_it_comes_changes_and_goes(world):
    world.watcher.present.clear()
    async with world.running():
        assert not world.registry.volumes
        world.watcher.put(NODE, UUID)
        await world.seen.until(f"fresh {NODE}")
        world.watcher.put(NODE, UUID)
        await world.seen.until(f"changed {NODE}")
        world.watcher.remove(NODE)
        await world.seen.until("removed")
        assert not world.registry.volumes


async def test_a_change_by_another_tool_is_seen(world):
    async with world.running():
        world.disk.replace(0, make_volume([b"a", b"b"]))
        world.watcher.put(NODE, UUID)
        await world.seen.until(f"changed {NODE}")
        assert sorted(world.registry.get(UUID).view.metadata.keyslots) == [0, 1]


async def test_a_burst_of_changes_is_examined_a_few_times(world):
    async with world.running():
        before = len(world.devices.opened)
        for _ in range(100):
            world.watcher.put(NODE, UUID)
        await world.seen.until(f"changed {NODE}")
        await world.registry.settle(UUID)
        assert len(world.devices.opened) - before < 40  # two for each time


async def test_nothing_is_written_while_two_devices_show_one_uuid(world):
    twin = SimDisk(world.disk.content, path="/dev/sim1")
    world.devices.disks[twin.path] = twin
    async with world.running():
        world.watcher.put(twin.path, UUID)
        await world.seen.until(f"fresh {NODE} {twin.path}")
        volume = world.registry.get(UUID)
        assert volume.problems[0].code == "uuid-ambiguous"
        assert volume.problems[0].action == "person"
        for refused in (lambda: world.start("enroll"), lambda: world.registry.writable(UUID)):
            with pytest.raises(NeedsPerson, match=f"{NODE} and {twin.path} show one UUID"):
                refused()
        world.watcher.remove(NODE)
        await world.seen.until(f"fresh {twin.path}")
        assert world.registry.writable(UUID).nodes == (twin.path,)
        await world.start("enroll").wait()
    assert not world.disk.log
    assert twin.log


async def test_what_was_seen_of_a_volume_that_changed_meanwhile_is_not_believed(world):
    examine, begun, go = world.volumes.examine, asyncio.Event(), asyncio.Event()

    async def held(ref, **options):
        begun.set()
        await go.wait()
        return await examine(ref, **options)

    twin = SimDisk(world.disk.content, path="/dev/sim1")
    world.devices.disks[twin.path] = twin
    async with world.running():
        world.volumes.examine = held
        world.registry.refresh(UUID)
        await begun.wait()
        world.watcher.put(twin.path, UUID)
        while twin.path not in world.registry.get(UUID).nodes:  # noqa: ASYNC110 -- the registry tells of it only once it has been examined
            await asyncio.sleep(0)
        go.set()
        await world.seen.until(f"fresh {NODE} {twin.path}")
        assert world.registry.get(UUID).ambiguous
        begun.clear()
        go.clear()
        world.registry.refresh(UUID)
        await begun.wait()
        world.watcher.remove(NODE)
        world.watcher.remove(twin.path)
        await world.seen.until("removed")
        go.set()
        await world.registry.settle(UUID)
    assert not world.registry.volumes
    assert world.seen.lines == []


async def test_a_volume_is_of_the_system_unless_all_of_its_devices_are_removable(world):
    stick = Traits(("/dev/disk/by-id/usb-x", "/dev/disk/by-uuid/y"), "usb", removable=True)
    async with world.running():
        assert (world.registry.get(UUID).system, world.registry.get(UUID).links) == (True, ())
        world.watcher.put(NODE, UUID, stick)
        await world.seen.until(f"changed {NODE}")
        assert (world.registry.get(UUID).system, world.registry.get(UUID).links) == (False, stick.links)
        world.watcher.put("/dev/sim1", UUID, Traits(("/dev/disk/by-id/ata-x",)))
        await world.seen.until(f"fresh {NODE} /dev/sim1")
        assert world.registry.get(UUID).system
        assert world.registry.get(UUID).links == ("/dev/disk/by-id/ata-x", *stick.links)


async def test_a_detached_header_is_where_it_is_read(world):
    world.devices.disks["/srv/header"] = SimDisk(world.disk.content, path="/srv/header")
    world.disk.replace(0, bytes(32768))
    world.watcher.put(NODE, UUID, header="/srv/header")
    async with world.running():
        volume = world.registry.get(UUID)
        assert volume.ref == DeviceRef(NODE, "/srv/header", UUID)
        assert (volume.header, volume.problems) == ("/srv/header", ())
        await world.start("enroll").wait()
    assert not world.disk.log
    assert world.devices.disks["/srv/header"].log


STICK = Traits(("/dev/disk/by-id/usb-stick-1", "/dev/disk/by-label/ata-x"), "usb", removable=True)


@pytest.mark.parametrize(
    ("allow", "deny", "managed"),
    [
        ([], [], True),
        ([("bus", "usb")], [], True),
        ([("bus", "ata")], [], False),
        ([], [("bus", "usb")], False),
        ([("id", "usb-stick-*")], [], True),
        ([("id", "ata-*")], [], False),  # anybody can write a label that looks so
        ([("uuid", UUID.upper())], [], True),
        ([("uuid", OTHER_UUID)], [], False),
        ([("bus", "usb")], [("uuid", UUID)], False),
    ],
)
async def test_the_rules_say_what_is_managed(world, allow, deny, managed):
    rules = DeviceRules(*(tuple(Rule(*rule) for rule in listed) for listed in (allow, deny)))
    world.watcher.put(NODE, UUID, STICK)
    world.registry.configure(rules)
    async with world.running():
        assert (UUID in world.registry.volumes) is managed
        assert bool(world.devices.opened) is managed  # nothing is read of the others
        world.registry.configure(DeviceRules())
        await world.registry.settle(UUID)
        assert UUID in world.registry.volumes
        world.seen.lines.clear()
        world.registry.configure(rules)
        assert world.seen.lines == ([] if managed else ["removed"])
        assert (UUID in world.registry.volumes) is managed


async def test_a_device_may_be_admitted_once_udev_knows_more_of_it(world):
    world.registry.configure(DeviceRules(allow=(Rule("bus", "usb"),)))
    async with world.running():
        assert not world.registry.volumes
        world.watcher.put(NODE, UUID, STICK)
        await world.seen.until(f"fresh {NODE}")
        world.watcher.put(NODE, UUID, Traits())
        await world.seen.until("removed")
        world.watcher.put(NODE, UUID, STICK)
        await world.seen.until(f"fresh {NODE}")


async def test_what_the_configuration_names_no_rule_keeps_out(world):
    world.watcher.put(NODE, UUID, configured=True)
    world.registry.configure(DeviceRules(deny=(Rule("uuid", "*"),)))
    async with world.running():
        assert UUID in world.registry.volumes


async def test_a_clone_that_is_denied_does_not_count(world):
    twin = SimDisk(world.disk.content, path="/dev/sim1")
    world.devices.disks[twin.path] = twin
    async with world.running():
        world.watcher.put(twin.path, UUID, STICK)
        await world.seen.until(f"fresh {NODE} {twin.path}")
        world.registry.configure(DeviceRules(deny=(Rule("bus", "usb"),)))
        await world.seen.until(f"fresh {NODE}")
        assert world.registry.writable(UUID).nodes == (NODE,)
        world.registry.configure(DeviceRules())
        await world.seen.until(f"fresh {NODE} {twin.path}")


async def test_a_job_is_let_end_before_its_volume_is_not_managed_any_more(world):
    async with world.running():
        first, begun, go = world.start("enroll"), asyncio.Event(), asyncio.Event()
        examine = world.volumes.examine

        async def held(ref, **options):  # the end of the job, which wants the volume to be looked at
            begun.set()
            await go.wait()
            return await examine(ref, **options)

        world.volumes.examine = held
        await begun.wait()
        second = world.start("rotate")
        world.registry.configure(DeviceRules(deny=(Rule("uuid", "*"),)))
        world.watcher.put(NODE, UUID, Traits())
        await world.watcher.drained()
        assert UUID in world.registry.volumes
        with pytest.raises(UnknownDevice, match="does not admit"):
            world.start("rotate")
        go.set()
        await first.wait()
        with pytest.raises(UnknownDevice, match="does not admit"):
            await second.wait()
        await world.seen.until("removed")
        assert not world.registry.volumes
        assert world.opened_by(NEXT) == [1]


async def test_rules_that_change_back_while_a_job_is_at_work_change_nothing(world):
    async with world.running():
        job = world.start("enroll")
        world.registry.configure(DeviceRules(deny=(Rule("uuid", "*"),)))
        world.registry.configure(DeviceRules())
        await job.wait()
        assert world.registry.writable(UUID)
    assert "removed" not in world.seen.lines


async def test_a_job_is_no_reason_to_keep_a_volume_that_was_pulled(world):
    async with world.running():
        job = world.start("enroll")
        await asyncio.sleep(0)
        world.registry.configure(DeviceRules(deny=(Rule("uuid", "*"),)))
        world.watcher.remove(NODE)
        await world.seen.until("removed")
        await job.wait()
        assert not world.registry.volumes


async def test_two_watchers_that_show_one_volume(world):
    """An image that is configured, and a loop device on it."""
    image = SimDisk(world.disk.content, path="/srv/image")
    world.devices.disks[image.path] = image
    images = SimWatcher()
    images.put(image.path, UUID, configured=True)
    registry = Registry(world.volumes, world.watcher, images)
    following = asyncio.create_task(registry.run())
    await registry.scanned()
    assert sorted(registry.get(UUID).nodes) == [NODE, image.path]
    with pytest.raises(NeedsPerson, match="show one UUID"):
        registry.writable(UUID)
    images.close()
    seen = Seen()
    registry.observe(seen)
    world.watcher.remove(NODE)
    await seen.until(f"fresh {image.path}")
    world.watcher.close()
    await following


async def test_the_device_of_a_detached_header_is_no_volume_of_its_own(world):
    """A block device with nothing but a header on it: udev shows that, too."""
    world.watcher.put("/dev/sim1", UUID, header=NODE, configured=True)
    async with world.running():
        assert world.registry.get(UUID).places[0].key == ("/dev/sim1", NODE)
        assert not world.registry.get(UUID).ambiguous
        world.watcher.put(NODE, UUID)
        await world.seen.until("changed /dev/sim1")
        await world.start("enroll").wait()
    assert world.opened_by(NEXT)


async def test_a_node_that_gets_another_volume(world):
    async with world.running():
        world.disk.replace(0, make_volume([b"x"], uuid=OTHER_UUID))
        world.watcher.put(NODE, OTHER_UUID)
        await world.seen.until("removed")
        await world.seen.until(f"fresh {NODE}")
        assert list(world.registry.volumes) == [OTHER_UUID]


async def test_a_header_that_cannot_be_read_is_shown_with_the_reason(world):
    world.disk.replace(0, bytes(32768))
    async with world.running():
        volume = world.registry.get(UUID)
        assert volume.view is None
        assert [problem.action for problem in volume.problems] == ["person"]
        assert not volume.repairable


async def test_code_that_fails_on_one_volume_does_not_end_the_rest(world, caplog):
    async def fail(ref, **options):
        raise ZeroDivisionError

    world.volumes.examine = fail
    async with world.running():
        assert world.registry.get(UUID).problems[0].code == "internal"
    assert "cannot examine" in caplog.text


async def test_an_observer_that_fails_does_not_end_the_rest(world, caplog):
    class Broken:
        def __getattr__(self, name):
            raise ZeroDivisionError(name)

    world.registry = Registry(world.volumes, world.watcher, pause_seconds=0)
    world.registry.observe(Broken())
    world.registry.observe(world.seen)
    async with world.running():
        world.watcher.remove(NODE)
        await world.seen.until("removed")
        world.watcher.put(NODE, UUID)
        await world.seen.until(f"fresh {NODE}")
    assert caplog.text.count("an observer of the volumes failed") == 5


async def test_a_volume_that_is_locked_is_examined_again_later(world):
    world.locks.wait = False
    world.registry = Registry(world.volumes, world.watcher, retry_seconds=0)
    seen = Seen()
    world.registry.observe(seen)
    following = asyncio.create_task(world.registry.run())
    held = world.devices.open(DeviceRef(NODE))
    with world.locks.held_elsewhere(Level.METADATA, held):
        await world.registry.scanned()
        assert [problem.code for problem in world.registry.get(UUID).problems] == ["lock-timeout"]
    await seen.until(f"changed {NODE}")
    while world.registry.get(UUID).problems:
        await seen.until(f"changed {NODE}")
    assert world.registry.get(UUID).view is not None
    held.close()
    world.watcher.close()
    await following


class Foreign:
    """An observer that keeps what others have changed."""

    def __init__(self):
        self.changes = []

    def volume_added(self, volume):
        pass

    def volume_changed(self, volume, *, fresh):
        if volume.foreign:
            self.changes.append(volume.foreign)

    def volume_removed(self, volume):
        pass


@pytest.fixture
def foreign(world):
    foreign = Foreign()
    world.registry.observe(foreign)
    return foreign


async def test_a_change_by_somebody_else_is_told_once(world, foreign):
    async with world.running():
        first = world.registry.get(UUID).view
        steps = [(first.seqid + 2, 1), (first.seqid + 2, 2), (first.seqid, 1)]
        for seqid, keyslots in steps:
            world.disk.replace(0, forge.with_fields(make_volume([OLD] * keyslots), seqid=seqid))
            for _ in range(3):
                world.watcher.put(NODE, UUID)
                await world.seen.until(f"changed {NODE}")
    now = first.seqid + 2
    assert [(change.before, change.after, change.direction) for change in foreign.changes] == [
        (first.seqid, now, "newer"),
        (now, now, "same"),
        (now, first.seqid, "older"),
    ]
    recorded = [entry for entry in world.journal.entries if entry.fields.get("kind") == "foreign-change"]
    assert [entry.fields["how"] for entry in recorded] == ["newer", "same", "older"]


async def test_what_changed_while_the_volume_was_away_is_told_too(world, foreign):
    async with world.running():
        world.watcher.remove(NODE)
        await world.seen.until("removed")
        world.disk.replace(0, forge.with_fields(make_volume([OLD]), seqid=40))
        world.watcher.put(NODE, UUID)
        await world.seen.until(f"fresh {NODE}")
        assert [change.after for change in foreign.changes] == [40]


async def test_our_own_changes_are_not_somebody_elses(world, foreign):
    """udev tells of each of our own writes, and the registry looks while the job goes on."""
    loop = asyncio.get_running_loop()
    world.disk.observer = lambda _: loop.call_soon_threadsafe(world.watcher.put, NODE, UUID)
    async with world.running():
        await world.enrolled()
        for _ in range(3):
            await world.start("rotate", new=NEXT).wait()
            world.watcher.put(NODE, UUID)
            await world.seen.until(f"changed {NODE}")
        assert world.registry.get(UUID).view.digest == world.view.digest
    assert foreign.changes == []


async def test_what_we_write_while_a_volume_is_looked_at_is_ours(world, foreign):
    """The look has read the header of before, and says so only when the new one is there."""
    examine, begun, go = world.volumes.examine, asyncio.Event(), asyncio.Event()

    async def held(ref, **options):
        seen = await examine(ref, **options)
        begun.set()
        await go.wait()
        return seen

    async with world.running():
        world.volumes.examine = held
        world.watcher.put(NODE, UUID)
        await begun.wait()
        job = world.start("enroll")
        job.subscribe(lambda: go.set() if job.step == "done" else None)
        await job.wait()
        assert world.registry.get(UUID).view.digest == world.view.digest
    assert foreign.changes == []


async def test_somebody_elses_change_in_the_middle_of_a_job_of_ours_is_told(world, foreign):
    """The job begins again on what is there now; that is ours, and what it found is not."""
    async with world.running():
        first = world.registry.get(UUID).view.seqid

        def meanwhile(call):
            if call == "session":  # the key of the volume is being derived
                world.disk.replace(0, forge.with_fields(make_volume([OLD, b"theirs"]), seqid=first + 4))
                world.watcher.put(NODE, UUID)

        world.engine.on_call = meanwhile
        await world.start("enroll").wait()
        world.watcher.put(NODE, UUID)
        await world.watcher.drained()
        await world.registry.settle(UUID)
        assert world.registry.get(UUID).view.digest == world.view.digest
    assert foreign.changes == [ForeignChange(first, first + 4)]


async def test_a_commit_of_ours_that_failed_half_way_is_ours(world, foreign):
    async with world.running():
        world.disk.faults.writes = {2: 512}
        with pytest.raises(DeviceError) as caught:
            await world.start("enroll").wait()
        assert caught.value.outcome is Outcome.UNKNOWN
        await world.registry.settle(UUID)
        (repair,) = (job for job in world.runner.jobs.values() if job.kind == "reconcile")
        await repair.wait()
        assert world.registry.get(UUID).view.digest == world.view.digest
        assert foreign.changes == []
        world.disk.replace(0, forge.with_fields(make_volume([OLD]), seqid=40))
        await world.registry.settle(UUID)
        assert len(foreign.changes) == 1


@pytest.mark.parametrize("uuid", ["", "../../etc", "x" * 36, OTHER_UUID + "\n"])
async def test_a_malformed_uuid_is_left_alone(world, uuid):
    async with world.running():
        world.watcher.put("/dev/sim9", uuid)
        world.watcher.put(NODE, UUID)
        await world.seen.until(f"changed {NODE}")
        assert list(world.registry.volumes) == [UUID]


async def test_what_a_crash_left_is_reconciled_when_the_volume_comes(world):
    size = world.view.pair.hdr_size
    world.disk.replace(size, bytes(4096))
    async with world.running():
        job = next(iter(world.runner.jobs.values()))
        await job.wait()
        assert not world.registry.get(UUID).problems
        assert world.view.pair.agree
        assert world.opened_by(OLD)


async def test_a_reconcile_that_fails_is_not_tried_again_and_again(world):
    size = world.view.pair.hdr_size
    world.disk.replace(size, bytes(4096))
    world.disk.faults.writes = dict.fromkeys(range(100), 0)
    started = []
    world.runner.observe(SimpleNamespace(job_added=started.append, job_ended=id, job_forgotten=id))
    async with world.running():
        (job,) = started
        with pytest.raises(DeviceError):
            await job.wait()
        await world.registry.settle(UUID)
        await world.registry.settle(UUID)
        assert started == [job]
        assert [problem.code for problem in world.registry.get(UUID).problems] == ["header-copy-bad"]


async def test_the_inventory_of_a_volume_in_order_is_kept_when_it_comes(world):
    async with world.running():
        assert [entry.keyslot for entry in world.inventories.kept[UUID].entries] == [0]
        world.disk.replace(0, make_volume([OLD, b"leaked"]))
        world.watcher.put(NODE, UUID)  # a change is not a coming
        await world.seen.until(f"changed {NODE}")
        assert [entry.keyslot for entry in world.inventories.kept[UUID].entries] == [0]
        assert [problem.code for problem in world.registry.get(UUID).problems] == ["keyslot-suspect"]
        world.watcher.remove(NODE)
        world.watcher.put(NODE, UUID)
        await world.seen.until(f"fresh {NODE}")
        assert [entry.known for entry in world.inventories.kept[UUID].entries] == [True, False]
        assert [problem.code for problem in world.registry.get(UUID).problems] == ["keyslot-suspect"]


async def test_no_inventory_is_kept_of_a_volume_that_is_not_in_order(world):
    world.disk.replace(0, forge.erased(world.disk.content, forge.Which.SECONDARY))
    world.disk.faults.writes = dict.fromkeys(range(100), 0)
    async with world.running():
        await world.registry.settle(UUID)
        assert world.registry.get(UUID).problems
    assert world.inventories.kept == {}


async def test_no_inventory_is_kept_of_one_of_two_copies(world):
    world.devices.disks["/dev/sim1"] = SimDisk(world.disk.content, path="/dev/sim1")
    async with world.running():
        world.inventories.kept.clear()
        world.watcher.put("/dev/sim1", UUID)
        await world.seen.until(f"fresh {NODE} /dev/sim1")
    assert world.inventories.kept == {}


async def test_an_inventory_that_cannot_be_kept_is_told_of(world):
    world.inventories.broken = "simulated"
    async with world.running():
        assert {problem.code for problem in world.registry.get(UUID).problems} == {"inventory-unavailable"}
        assert not world.registry.get(UUID).repairable


async def test_what_was_pulled_in_the_middle_of_a_job_is_finished_when_it_comes_again(world):
    """It goes after the new header is in force, and before the old key is wiped."""
    async with world.running():
        await world.enrolled()
        written = world.disk.writes
        world.disk.faults.gone_at_write = written + 3  # new area, both copies; then the wipe
        with pytest.raises(DeviceError):
            await world.start("rotate").wait()
        world.watcher.remove(NODE)
        await world.seen.until("removed")
        world.disk.power_cut()
        assert world.view.pending
        world.watcher.put(NODE, UUID)
        await world.seen.until(f"fresh {NODE}")
        (repair,) = (job for job in world.runner.jobs.values() if job.kind == "reconcile" and not job.ended)
        await repair.wait()
        assert not world.view.pending
        assert (world.opened_by(NEXT), world.opened_by(BACKUP)) == ([2], [])
        assert world.registry.get(UUID).problems == ()


async def test_a_device_that_appears_during_the_scan_is_neither_lost_nor_twice(world):
    """The watcher knows it as there and tells of it as new; the first volume is still being examined."""
    world.devices.disks["/dev/sim1"] = SimDisk(make_volume([OLD], uuid=OTHER_UUID), path="/dev/sim1")
    examine, begun, go = world.volumes.examine, asyncio.Event(), asyncio.Event()

    async def held(ref, **options):
        begun.set()
        await go.wait()
        return await examine(ref, **options)

    world.volumes.examine = held
    following = asyncio.create_task(world.registry.run())
    scanned = asyncio.create_task(world.registry.scanned())
    await begun.wait()
    world.watcher.put("/dev/sim1", OTHER_UUID)
    world.watcher.put("/dev/sim1", OTHER_UUID)
    go.set()
    await scanned
    await world.seen.until("added /dev/sim1")
    assert sorted(world.registry.volumes) == sorted([UUID, OTHER_UUID])
    assert world.registry.get(OTHER_UUID).nodes == ("/dev/sim1",)
    world.watcher.close()
    await following


async def test_a_storm_of_events_is_one_examination_in_each_pause(world):
    """However many there are; what is urgent does not wait for its end, and nothing is forgotten."""
    examine, done = world.volumes.examine, []

    async def counted(ref, **options):
        done.append(ref)
        return await examine(ref, **options)

    def storm():
        for _ in range(1000):
            world.watcher.put(NODE, UUID)
        return world.watcher.drained()

    world.volumes.examine = counted
    world.registry = Registry(world.volumes, world.watcher, pause_seconds=3600)
    async with world.running():
        assert len(done) == 1
        await storm()
        assert len(done) == 1  # that of its coming was just now
        await world.registry.settle(UUID)
        assert len(done) == 2
        await storm()
        assert len(done) == 2
        world.devices.disks["/dev/sim1"] = SimDisk(world.disk.content, path="/dev/sim1")
        world.watcher.put("/dev/sim1", UUID)
        await world.watcher.drained()
        await world.registry.scanned()
        assert len(done) == 3


async def test_after_a_storm_the_last_state_is_seen(world):
    world.registry = Registry(world.volumes, world.watcher, pause_seconds=0.05)
    world.registry.observe(world.seen)
    async with world.running():
        for keyslots in range(2, 6):
            world.disk.replace(0, make_volume([OLD] * keyslots))
            world.watcher.put(NODE, UUID)
        while len(world.registry.get(UUID).view.metadata.keyslots) < keyslots:
            await world.seen.until(f"changed {NODE}")


@pytest.mark.parametrize("when", ["open", "read"])
async def test_a_device_that_vanishes_while_it_is_examined(world, when):
    async with world.running():
        if when == "open":
            del world.devices.disks[NODE]
        else:
            world.disk.faults.gone = True
        world.watcher.put(NODE, UUID)
        await world.seen.until(f"changed {NODE}")
        volume = world.registry.get(UUID)
        assert volume.view is None
        assert [problem.action for problem in volume.problems] == ["person"]
        world.watcher.remove(NODE)
        await world.seen.until("removed")
        world.devices.disks[NODE] = world.disk
        world.disk.faults.gone = False
        world.watcher.put(NODE, UUID)
        await world.seen.until(f"fresh {NODE}")
        assert world.registry.get(UUID).view is not None


async def test_a_look_that_was_refused_does_not_make_ours_somebody_elses(world, foreign):
    """While another tool holds the lock nothing is read, so what we wrote is still to be seen."""
    world.locks.wait = False
    async with world.running():
        held = world.devices.open(DeviceRef(NODE))
        settled, world.registry.settle = world.registry.settle, asyncio.sleep
        job = world.start("enroll")
        world.registry.settle = lambda uuid: asyncio.sleep(0)
        await job.wait()
        world.registry.settle = settled
        with world.locks.held_elsewhere(Level.METADATA, held):
            world.watcher.put(NODE, UUID)
            await world.seen.until(f"changed {NODE}")
            assert world.registry.get(UUID).problems
        held.close()
        world.watcher.put(NODE, UUID)
        await world.seen.until(f"changed {NODE}")
        assert world.registry.get(UUID).view.digest == world.view.digest
    assert foreign.changes == []
