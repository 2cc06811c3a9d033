# SPDX-License-Identifier: GPL-2.0-or-later
"""The matrix can see: bugs that are planted in the commit are caught by it."""

from contextlib import suppress

import pytest

from luksrotd.errors import DeviceError, Outcome
from luksrotd.service import commit
from tests.faults.matrix import disturb, flush_faults, losses, pulls, row, write_faults
from tests.support.simdisk import SimDevice


def found(what, name, *kinds):
    """Whether the matrix says that of one verb."""
    log = row(name).log
    return any(what in said for kind in kinds for fault in kind(log) for said in disturb(name, fault))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Judges forget: a state that one has called good is not looked at again."""
    row.cache_clear()
    yield
    row.cache_clear()


def test_without_a_bug_nothing_is_found():
    assert not found("", "rotation", write_faults, flush_faults)


@pytest.mark.parametrize("outcome", Outcome)
def test_an_outcome_that_is_always_the_same(monkeypatch, outcome):
    row("rotation")
    monkeypatch.setattr(commit, "_truth", lambda plan, device: outcome)
    assert found(f"{outcome} was told, but ", "rotation", write_faults, flush_faults, pulls)


def test_an_outcome_that_is_read_off_the_page_cache(monkeypatch):
    row("rotation")
    monkeypatch.setattr(commit, "_truth", lambda plan, device: plan.outcome(device.read(0, len(plan.base))))
    assert found(" was told, but unknown-reconcile-needed is true", "rotation", flush_faults)


def test_a_flush_that_is_tried_again(monkeypatch):
    row("rotation")

    def write(step, device):
        for each in step.writes:
            device.write(each.offset, each.data)
        try:
            device.flush()
        except DeviceError:
            device._failure = ""
            device.flush()

    monkeypatch.setattr(commit, "_write", write)
    assert found("no error", "rotation", flush_faults)


def test_a_write_that_is_tried_again(monkeypatch):
    row("rotation")

    def write(step, device):
        for each in step.writes:
            with suppress(DeviceError):
                device.write(each.offset, each.data)
                continue
            device.write(each.offset, each.data)
        device.flush()

    monkeypatch.setattr(commit, "_write", write)
    assert found("1 writes and flushes after the one that failed", "rotation", write_faults)


def test_a_reconcile_that_believes_in_what_was_never_flushed(monkeypatch):
    row("other associated data")
    monkeypatch.setattr(commit, "_settle", lambda plan, device: None)
    assert found("cannot find a LUKS2 header", "other associated data", write_faults)


def test_a_device_that_is_believed(monkeypatch):
    row("rotation")
    monkeypatch.setattr(commit, "_check_written", lambda plan, device, step: None)
    assert found("no error", "rotation", losses)


def test_a_page_cache_that_is_believed(monkeypatch):
    row("rotation")
    monkeypatch.setattr(SimDevice, "read_medium", lambda self, offset, size: self.disk.medium()[offset : offset + size])
    assert found("cache kept: ", "rotation", flush_faults)
