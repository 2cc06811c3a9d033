# SPDX-License-Identifier: GPL-2.0-or-later
"""Every verb, and a lock that is not to be had: held for ever, or in a directory that is none.  Nothing happens."""

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path

import pytest

from luksrotd.errors import Busy, LockError, LockTimeout, Outcome
from luksrotd.host.locks import HostLocks
from luksrotd.ports import Host
from luksrotd.service.volume import Volumes
from tests.contract.conftest import loop_device, open_descriptors
from tests.faults.matrix import VERBS, leaks, row
from tests.support.simdisk import SimDevice
from tests.support.simlocks import Level
from tests.support.simulation import Simulation


def refused(name, simulation, error):
    """The verb fails with that error, and nothing is written (what crashes have left may have been finished)."""
    this = row(name)
    descriptors = open_descriptors()
    with pytest.raises(error) as caught:
        this.operate(simulation)
    assert type(caught.value) is error
    assert caught.value.outcome is Outcome.UNCHANGED
    assert leaks(simulation) == []
    assert open_descriptors() == descriptors
    assert not simulation.disk.dirty
    assert this.judge.violations(simulation.disk.content) == []


@pytest.mark.parametrize("level", Level)
@pytest.mark.parametrize("name", VERBS)
def test_a_lock_that_another_process_holds_for_ever(name, level):
    simulation = Simulation(row(name).scenario.before)
    with simulation.locks.held_elsewhere(level, SimDevice(simulation.disk)):
        refused(name, simulation, Busy if level is Level.JOB else LockTimeout)
    assert simulation.disk.log == []
    row(name).operate(simulation)


@pytest.mark.parametrize("name", VERBS)
def test_a_metadata_lock_that_another_process_takes_while_the_key_is_derived(name):
    """Shared, so that the header can still be read: only the commit is kept out."""
    simulation = Simulation(row(name).scenario.before)
    engine, started = simulation.engine, []

    def on_call(call):
        if not started:
            started.append(simulation.locks.held_elsewhere(Level.METADATA, SimDevice(simulation.disk), exclusive=False))
            started[0].__enter__()

    engine.on_call = on_call
    refused(name, simulation, LockTimeout)
    assert simulation.disk.log == []
    started[0].__exit__(None, None, None)
    row(name).operate(simulation)


class RealLocks(Simulation):
    """The simulated volume, under real locks of a real loop device."""

    def __init__(self, content, node, locks):
        super().__init__(content)
        status = Path(node).stat()
        self.disk.identity = type(self.disk.identity)(True, os.major(status.st_rdev), os.minor(status.st_rdev))
        old = self.host
        self.host = Host(old.devices, locks, old.shadows, old.engine, old.probe, old.entropy, old.clock, old.journal)
        self.volumes = Volumes(self.host)


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    image = tmp_path_factory.mktemp("locks") / "image"
    image.write_bytes(bytes(65536))
    with loop_device(image) as node:
        yield node


@pytest.fixture
def directories(tmp_path):
    """Of the job lock and of the metadata lock."""
    found = {Level.JOB: tmp_path / "runtime", Level.METADATA: tmp_path / "cryptsetup"}
    for directory in found.values():
        directory.mkdir(0o700)
    return found


def locks_in(directories, wait=0.0):
    """Real locks, which do not wait."""
    runtime, cryptsetup = str(directories[Level.JOB]), str(directories[Level.METADATA])
    return HostLocks(runtime=runtime, cryptsetup=cryptsetup, job_wait=wait, lock_wait=wait)


def works(name, node, directories):
    """With locks that wait: a udevd may be looking at the loop device."""
    simulation = RealLocks(row(name).scenario.before, node, locks_in(directories, 3600.0))
    row(name).operate(simulation)
    assert simulation.disk.content == row(name).scenario.after


def spoil(directory, what):
    """Make something else of an empty lock directory."""
    directory.rmdir()
    if what == "a symlink":
        elsewhere = directory.with_name("elsewhere")
        elsewhere.mkdir()
        directory.symlink_to(elsewhere)
    elif what == "a file":
        directory.touch()
    else:
        directory.parent.rename(directory.parent.with_name("moved"))


@pytest.mark.parametrize("level", [Level.JOB, Level.METADATA])
@pytest.mark.parametrize("what", ["a symlink", "a file", "missing with its parent"])
@pytest.mark.parametrize("name", VERBS)
def test_a_lock_directory_that_is_none(tmp_path, node, name, level, what):
    directories = {Level.JOB: tmp_path / "a" / "runtime", Level.METADATA: tmp_path / "b" / "cryptsetup"}
    for directory in directories.values():
        directory.mkdir(0o700, parents=True)
    spoil(directories[level], what)
    simulation = RealLocks(row(name).scenario.before, node, locks_in(directories))
    refused(name, simulation, LockError)
    assert simulation.disk.log == []


@pytest.mark.parametrize("name", VERBS)
def test_a_lock_directory_that_is_missing_is_made(node, directories, name):
    for directory in directories.values():
        directory.rmdir()
    works(name, node, directories)
    assert [*directories[Level.JOB].iterdir(), *directories[Level.METADATA].iterdir()] == []


@contextmanager
def flocked(path):
    """An open file description of its own excludes as another process does."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


@pytest.mark.parametrize("level", [Level.JOB, Level.METADATA])
@pytest.mark.parametrize("name", VERBS)
def test_a_real_lock_that_is_held_for_ever(node, directories, name, level):
    simulation = RealLocks(row(name).scenario.before, node, locks_in(directories))
    prefix = "lock-" if level is Level.JOB else "L_"
    identity = simulation.disk.identity
    suffix = str(identity) if level is Level.JOB else f"{identity.major}:{identity.minor}"
    with flocked(directories[level] / f"{prefix}{suffix}"):
        refused(name, simulation, Busy if level is Level.JOB else LockTimeout)
    assert simulation.disk.log == []
    works(name, node, directories)


@pytest.mark.parametrize("name", VERBS)
def test_a_lock_directory_that_goes_away_while_the_key_is_derived(tmp_path, node, directories, name):
    """The commit finds no lock to take, so it writes nothing."""
    simulation = RealLocks(row(name).scenario.before, node, locks_in(directories))
    cryptsetup = directories[Level.METADATA]

    def on_call(call):
        if not cryptsetup.is_symlink():
            cryptsetup.rmdir()
            cryptsetup.symlink_to(tmp_path)

    simulation.engine.on_call = on_call
    refused(name, simulation, LockError)
    assert simulation.disk.log == []
