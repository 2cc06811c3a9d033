# SPDX-License-Identifier: GPL-2.0-or-later
"""``ports.Entropy``, ``ports.Clock`` and ``ports.Journal``, simulated and real."""

import io
import socket
from datetime import UTC, datetime, timedelta

import pytest

from luksrotd.host.clock import SystemClock
from luksrotd.host.entropy import KernelEntropy
from luksrotd.host.journal import SystemdJournal, line_of, name_of
from tests.support.simhost import SimClock, SimEntropy, SimJournal


@pytest.mark.parametrize("entropy", [SimEntropy(), KernelEntropy()], ids=["sim", "kernel"])
def test_random_bytes_are_as_many_as_asked_for_and_never_the_same(entropy):
    for length in (0, 1, 4096, 1024 * 1024):
        assert len(entropy.random(length)) == length
    assert entropy.random(32) != entropy.random(32)
    assert len(set(entropy.random(65536))) == 256


def test_simulated_random_bytes_depend_on_the_seed_only():
    assert SimEntropy(1).random(16) == SimEntropy(1).random(16) != SimEntropy(2).random(16)


@pytest.mark.parametrize("clock", [SimClock(), SystemClock()], ids=["sim", "system"])
def test_the_time_is_utc_in_whole_seconds_and_does_not_go_back(clock):
    first = clock.now()
    assert first.tzinfo is UTC
    assert first.microsecond == 0
    assert clock.now() >= first


def test_the_system_clock_is_the_systems():
    before = datetime.now(UTC)
    now = SystemClock().now()
    assert before - timedelta(seconds=1) <= now <= datetime.now(UTC)


def test_the_simulated_clock_is_moved():
    clock = SimClock()
    before = clock.now()
    clock.advance(timedelta(days=90))
    assert clock.now() - before == timedelta(days=90)


class Closed(io.StringIO):
    def write(self, _):
        raise BrokenPipeError


@pytest.mark.parametrize("make", [SimJournal, lambda: SystemdJournal(socket="/nonexistent", stream=io.StringIO())])
def test_a_journal_takes_any_text(make):
    journal = make()
    journal.record("")
    journal.record("rotated\nfaked: entry \udcff", device="/dev/x", keyslot=3)


def test_an_entry_is_one_line_on_standard_error(capsys):
    journal = SystemdJournal(socket="/nonexistent")
    journal.record("rotated", device="/dev/sda 1", keyslot=3, label='a"b\nc', empty="", plain="x")
    journal.record("two\nlines")
    assert capsys.readouterr().err.splitlines() == [
        'rotated device="/dev/sda 1" keyslot=3 label="a\\"b\\nc" empty="" plain=x',
        '"two\\nlines"',
    ]


def test_a_journal_that_cannot_write_does_not_raise():
    SystemdJournal(socket="/nonexistent", stream=Closed()).record("rotated")
    SystemdJournal(socket="/nonexistent\0", stream=io.StringIO()).record("rotated")


def test_fields_are_ours_but_for_the_journals_own():
    assert name_of("device") == "LUKSROTD_DEVICE"
    assert name_of("message_id") == "MESSAGE_ID"
    assert name_of("priority") == "PRIORITY"
    assert line_of("done", {}) == "done"


def test_simulated_entries_can_be_searched():
    journal = SimJournal()
    journal.record("rotated", device="/dev/x")
    assert journal.entries[0].fields == {"device": "/dev/x"}
    assert "/dev/x" in journal.text()


def test_entries_reach_journald(journal_socket):
    """The socket of a private /run stands for journald's: systemd's library has its path compiled in."""
    stderr = io.StringIO()
    SystemdJournal(stream=stderr).record("rotated", device="/dev/x", keyslot=3, priority=4, message_id="ab" * 16)
    fields = dict(line.split("=", 1) for line in journal_socket.recv(65536).decode().splitlines() if "=" in line)
    assert fields["MESSAGE"] == "rotated"
    assert fields["LUKSROTD_DEVICE"] == "/dev/x"
    assert fields["LUKSROTD_KEYSLOT"] == "3"
    assert fields["SYSLOG_IDENTIFIER"] == "luksrotd"
    assert (fields["PRIORITY"], fields["MESSAGE_ID"]) == ("4", "ab" * 16)
    assert stderr.getvalue() == ""


@pytest.fixture
def journal_socket(private_run):
    path = private_run / "systemd" / "journal" / "socket"
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        listener.settimeout(30)  # so that a lost entry is a failure and not a hang
        yield listener
