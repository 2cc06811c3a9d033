# SPDX-License-Identifier: GPL-2.0-or-later
"""Header backup and restore on simulated ports."""

import pytest

from luksrotd.errors import (
    BackupMismatch,
    Conflict,
    DeviceError,
    ForeignSignature,
    FormatError,
    Internal,
    InvalidRequest,
    NeedsReconcile,
    NotLuks2,
    Outcome,
    UnknownDevice,
    WrongCredential,
)
from luksrotd.luks2.layout import Which
from luksrotd.ports import DeviceRef
from luksrotd.rotation.change import Change
from luksrotd.service.headers import Headers
from luksrotd.service.progress import Stage
from tests.support import forge
from tests.support.simdisk import Flush, Write
from tests.support.simengine import HDR_SIZE, UUID, make_volume, opened_by
from tests.support.simfiles import SimFiles
from tests.support.simulation import MAIN, NEW, OLD, Simulation, run, secrets

HEADERS = 2 * HDR_SIZE


class Machine:
    """A volume with a managed key, and a backup of it, "backup", from before the last rotation."""

    def __init__(self):
        self.volume = Simulation(make_volume([MAIN]))
        self.files = SimFiles()
        self.headers = Headers(self.volume.host, self.files)
        self.volume.enroll(MAIN, OLD, ref="vault/1")
        self.saved = run(self.headers.backup(self.volume.ref, "backup"))
        self.volume.rotate(MAIN, NEW, ref="vault/2")
        self.log = len(self.volume.disk.log)

    @property
    def content(self):
        return self.volume.disk.content

    @property
    def wrote(self):
        return sum(isinstance(operation, Write) for operation in self.volume.disk.log[self.log :])

    def compare(self, **options):
        return run(self.headers.compare(self.volume.ref, "backup", **options))

    def restore(self, compared=None, secret=None):
        compared = compared or self.compare()
        if secret is None:
            return run(self.headers.restore(self.volume.ref, compared))
        with secrets(unlock=secret) as sources:
            return run(self.headers.restore(self.volume.ref, compared, sources["unlock"]))

    def opens(self):
        return [bool(opened_by(self.content, secret)) for secret in (MAIN, OLD, NEW)]

    def overwrite(self, image):
        """As another tool would."""
        self.volume.disk.replace(0, image)

    def lose(self):
        self.volume.disk.replace(0, bytes(HEADERS))


@pytest.fixture
def machine():
    return Machine()


def test_a_backup_is_told_of(machine):
    assert (machine.saved.uuid, machine.saved.keyslots) == (UUID, (0, 1))
    assert machine.saved.size == len(machine.files.content["backup"]) == forge.pair_of(machine.content).length
    entry = next(each for each in machine.volume.journal.entries if each.message == "header backed up")
    assert entry.fields["file"] == "backup"
    assert (entry.fields["uuid"], entry.fields["seqid_before"]) == (UUID, machine.saved.seqid)
    assert machine.volume.devices.leaked == ()


def test_a_backup_never_overwrites(machine):
    with pytest.raises(InvalidRequest):
        run(machine.headers.backup(machine.volume.ref, "backup"))
    machine.files.full = True
    with pytest.raises(DeviceError):
        run(machine.headers.backup(machine.volume.ref, "another"))


def test_a_backup_of_a_volume_that_is_not_in_order(machine):
    machine.overwrite(forge.unsealed(machine.content, Which.PRIMARY))
    with pytest.raises(NeedsReconcile):
        run(machine.headers.backup(machine.volume.ref, "another"))
    assert set(machine.files.content) == {"backup"}
    assert machine.wrote == 0


def test_a_restore_brings_the_old_key_back(machine):
    assert machine.opens() == [True, False, True]
    before = forge.view_of(machine.content).seqid
    done = machine.restore()
    assert machine.opens() == [True, True, False]
    assert (done.uuid, done.seqid_before) == (UUID, before)
    assert done.seqid_after == forge.view_of(machine.content).seqid > before
    (key,) = forge.view_of(machine.content).keys
    assert (key.token.generation, key.complete) == (1, True)
    entry = machine.volume.journal.entries[-1]
    assert (entry.message, entry.fields["seqid_after"]) == ("header restored", done.seqid_after)
    assert machine.volume.devices.leaked == ()
    assert machine.volume.shadows.leaked == ()


def test_every_phase_has_its_flush(machine):
    machine.restore()
    kinds = [type(operation) for operation in machine.volume.disk.log[machine.log :]]
    assert kinds == [Write, Flush] * 6


def test_a_comparison_writes_nothing_and_says_what_comes(machine):
    compared = machine.compare()
    assert [(one.what, one.name, one.how) for one in compared.differences] == [
        ("keyslot", "1", "add"),
        ("keyslot", "2", "remove"),
        ("token", "0", "change"),
        ("area", "36864", "rewrite"),
        ("area", "40960", "wipe"),
    ]
    assert compared.moved == ()
    assert machine.wrote == 0
    machine.volume.rotate(MAIN, b"third")
    assert machine.compare().moved == (1,)


def test_a_second_restore_has_nothing_to_do(machine):
    machine.restore()
    machine.log = len(machine.volume.disk.log)
    compared = machine.compare()
    assert compared.differences == ()
    done = machine.restore(compared)
    assert done.seqid_before == done.seqid_after
    assert machine.wrote == 0


def test_the_proof_comes_before_the_first_write(machine):
    with pytest.raises(WrongCredential) as caught:
        machine.restore(secret=NEW)
    assert caught.value.outcome is Outcome.UNCHANGED
    assert machine.wrote == 0
    machine.restore(secret=OLD)
    assert machine.opens() == [True, True, False]
    with pytest.raises(WrongCredential):
        machine.restore(secret=NEW)


def test_what_was_compared_must_still_be_so(machine):
    compared = machine.compare()
    machine.volume.rotate(MAIN, b"third")
    machine.log = len(machine.volume.disk.log)
    with pytest.raises(Conflict, match="since it was compared"):
        machine.restore(compared)
    assert machine.wrote == 0


def test_a_keyslot_that_changes_during_the_restore_is_not_taken_for_held(machine):
    """Another tool that has overwritten a keyslot, and not yet written its header: the restore begins anew."""
    compared = machine.compare()
    slot = forge.view_of(machine.content).metadata.keyslots[0].area
    hit = []

    def damage(name):
        machine.volume.engine.calls.append(name)
        if name == "load" and not hit:
            hit.append(name)
            machine.volume.disk.replace(slot.offset, bytes(slot.size))

    machine.volume.engine.on_call = damage
    machine.restore(compared)
    assert machine.opens() == [True, True, False]
    assert forge.view_of(machine.content).metadata.keyslots[0].area != slot


def test_another_tool_that_is_faster_is_a_conflict(machine):
    """The user has seen another difference."""
    compared = machine.compare()
    raced = []

    def race(name):
        if name == "load" and not raced:
            raced.append(name)
            machine.overwrite(forge.newer(machine.content, forge.BOTH))

    machine.volume.engine.on_call = race
    with pytest.raises(Conflict):
        machine.restore(compared)
    assert machine.wrote == 0


def test_one_good_copy_is_healed_first(machine):
    machine.overwrite(forge.erased(machine.content, Which.PRIMARY))
    machine.restore(machine.compare())
    assert machine.opens() == [True, True, False]
    assert forge.pair_of(machine.content).agree


@pytest.mark.parametrize("number", range(6))
def test_a_device_that_fails_is_told_of_truthfully(machine, number):
    compared = machine.compare()
    before = sum(isinstance(operation, Write) for operation in machine.volume.disk.log)
    machine.volume.disk.faults.writes[before + number] = 0
    with pytest.raises(DeviceError) as caught:
        machine.restore(compared)
    expected = [Outcome.UNCHANGED, Outcome.UNCHANGED, Outcome.UNKNOWN, Outcome.WIPE_PENDING, Outcome.WIPE_PENDING]
    assert caught.value.outcome is [*expected, Outcome.UNKNOWN][number]
    machine.volume.disk.faults.writes.clear()
    assert machine.volume.reconcile().left == ()
    assert machine.opens() in ([True, True, False], [True, False, True])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", FormatError),
        (make_volume([MAIN], uuid="11111111-2222-4333-8444-555555555555"), BackupMismatch),
        (make_volume([MAIN])[: HEADERS + 4096], FormatError),
    ],
)
def test_what_is_no_backup_of_this_volume(machine, content, error):
    machine.files.content["backup"] = content
    with pytest.raises(error):
        machine.compare()
    assert machine.wrote == 0


def test_a_foreign_signature_stops_it(machine):
    machine.volume.probe.planted["/dev/sim0"] = ("ext4",)
    with pytest.raises(ForeignSignature):
        machine.restore()
    machine.lose()
    with pytest.raises(ForeignSignature):
        machine.restore(machine.compare(force=True))
    assert machine.wrote == 0


# ---- a device that has lost its header


def test_a_lost_header_needs_force(machine):
    machine.lose()
    with pytest.raises(UnknownDevice):
        machine.compare()
    done = machine.restore(machine.compare(force=True))
    assert (done.uuid, done.seqid_before) == (UUID, 0)
    assert machine.opens() == [True, True, False]
    assert forge.pair_of(machine.content).agree
    assert machine.volume.devices.leaked == ()
    assert machine.volume.shadows.leaked == ()


def test_force_is_nothing_where_there_is_a_header(machine):
    machine.overwrite(forge.erased(machine.content, Which.SECONDARY))
    compared = machine.compare(force=True)
    assert compared.before is not None
    machine.restore(compared)
    assert machine.opens() == [True, True, False]


def test_a_header_that_comes_back_is_not_lost(machine):
    before = machine.content
    machine.lose()
    compared = machine.compare(force=True)
    machine.overwrite(before)
    with pytest.raises(InvalidRequest, match="a copy of it is there"):
        machine.restore(compared)
    assert machine.wrote == 0


def test_a_header_that_only_libcryptsetup_may_read_is_not_lost(machine):
    machine.overwrite(forge.with_text(machine.content, b"{}"))
    with pytest.raises(InvalidRequest, match="a copy of it is there"):
        machine.compare(force=True)


def test_another_version_is_not_lost(machine):
    machine.overwrite(forge.put(bytes(HEADERS), 0, b"LUKS\xba\xbe\0\1"))
    with pytest.raises(NotLuks2):
        machine.compare(force=True)


def test_a_device_that_is_too_small_for_the_header():
    machine = Machine()
    small = Simulation(bytes(HEADERS))
    headers = Headers(small.host, machine.files)
    with pytest.raises(FormatError, match=r"needs .* bytes"):
        run(headers.compare(small.ref, "backup", force=True))


def test_the_proof_counts_there_too(machine):
    machine.lose()
    compared = machine.compare(force=True)
    with pytest.raises(WrongCredential):
        machine.restore(compared, NEW)
    assert machine.wrote == 0
    machine.restore(compared, OLD)
    assert machine.opens() == [True, True, False]


def test_its_stages_are_told(machine):
    machine.lose()
    compared = machine.compare(force=True)
    steps = []
    run(machine.headers.restore(machine.volume.ref, compared, None, steps.append))
    assert steps[:2] == [Stage.LOCKING, Stage.READING]
    assert steps[-1] is Stage.DONE


def test_a_change_without_a_header_cannot_revive(machine):
    machine.lose()
    size = (len(machine.files.content["backup"]), HEADERS)
    with pytest.raises(Internal):
        run(machine.headers._transactor.revive(machine.volume.ref, lambda _: Change(), {}, size))


def test_a_volume_that_is_not_there(machine):
    with pytest.raises(UnknownDevice):
        run(machine.headers.backup(DeviceRef("/dev/none"), "another"))
