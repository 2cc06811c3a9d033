# SPDX-License-Identifier: GPL-2.0-or-later
"""``ports.History``, simulated and real: a journald, what root's processes sent it, and what others did."""

import subprocess
import uuid
from contextlib import contextmanager

import pytest

from luksrotd.errors import StateError
from luksrotd.host.history import JournalHistory
from luksrotd.host.journal import SystemdJournal, name_of
from luksrotd.names import MessageId
from luksrotd.ports import Query
from tests.contract.conftest import run
from tests.support.simhost import SimHistory, SimJournal

GAMES = 5
"""A user whose entries journald keeps among those of the system."""


class Real:
    def __init__(self):
        self.history = JournalHistory()

    def record(self, message, **fields):
        SystemdJournal().record(message, **fields)
        run("journalctl", "--sync")

    def write(self, uid, message, fields):
        """By another user's process, the way that every user may."""
        lines = [f"{name_of(name)}={value}" for name, value in {"message": message, **fields}.items()]
        lines += ["_UID=0", "_SYSTEMD_UNIT=luksrotd.service"]
        text = "\n".join(lines) + "\n"
        run("setpriv", f"--reuid={uid}", "--clear-groups", "logger", "--journald", data=text.encode())
        run("journalctl", "--sync")


class Simulated(SimJournal):
    def __init__(self):
        super().__init__()
        self.history = SimHistory(self)


@pytest.fixture(params=["sim", "journald"])
def journal(request):
    if request.param == "sim":
        return Simulated()
    request.getfixturevalue("bed")
    return Real()


@pytest.fixture
def volume():
    """A LUKS UUID that nobody has used."""
    return str(uuid.uuid4())


def rotated(volume, **fields):
    return {"message_id": MessageId.ROTATED.value, "uuid": volume, "kind": "rotate", **fields}


def messages(journal, **query):
    return [entry["message"] for entry in journal.history.entries(Query(**query))]


def test_what_was_recorded_is_read_back_with_its_fields(journal, volume):
    journal.record("key rotated", **rotated(volume, seqid_before=3, key="back up", priority=5))
    (entry,) = journal.history.entries(Query(volume))
    assert int(entry.pop("time")) > 10**15
    wanted = {"message": "key rotated", "kind": "rotate", "key": "back up", "seqid_before": "3", "priority": "5"}
    assert entry == {**wanted, "message_id": MessageId.ROTATED, "uuid": volume}


def test_the_oldest_comes_first_and_only_the_newest_come(journal, volume):
    for number in range(4):
        journal.record(str(number), **rotated(volume))
    assert messages(journal, uuid=volume) == ["0", "1", "2", "3"]
    assert messages(journal, uuid=volume, limit=2) == ["2", "3"]
    assert messages(journal, uuid=volume, limit=0) == []


def test_a_time_is_from_and_before(journal, volume):
    for number in range(4):
        journal.record(str(number), **rotated(volume))
    times = [int(entry["time"]) for entry in journal.history.entries(Query(volume))]
    assert times == sorted(set(times))
    assert messages(journal, uuid=volume, since=times[1]) == ["1", "2", "3"]
    assert messages(journal, uuid=volume, until=times[1]) == ["0"]
    assert messages(journal, uuid=volume, since=times[1], until=times[3], limit=1) == ["2"]
    assert messages(journal, uuid=volume, since=2**64 - 1) == []
    assert messages(journal, uuid=volume, until=2**64 - 1) == ["0", "1", "2", "3"]
    assert messages(journal, uuid=volume, until=0) == []


def test_other_volumes_and_other_messages_are_left_out(journal, volume):
    other = str(uuid.uuid4())
    journal.record("mine", **rotated(volume))
    journal.record("the other's", **rotated(other))
    journal.record("no record", uuid=volume, message_id="00112233445566778899aabbccddeeff")
    journal.record("no record", uuid=volume)
    assert messages(journal, uuid=volume) == ["mine"]
    assert messages(journal, limit=2) == ["mine", "the other's"]


def test_what_others_than_root_write_does_not_count(journal, volume):
    journal.record("true", **rotated(volume))
    journal.write(GAMES, "forged", rotated(volume))
    assert messages(journal, uuid=volume) == ["true"]
    if isinstance(journal, Real):  # else the test above proves nothing
        entry = run("journalctl", "--directory=/run/log/journal", "--output=cat", f"LUKSROTD_UUID={volume}")
        assert entry.split() == ["true", "forged"]


def test_text_of_any_kind(journal, volume):
    journal.record("key\nrotated", **rotated(volume, key="ä=\n\x01", node="x" * 5000))
    (entry,) = journal.history.entries(Query(volume))
    assert (entry["message"], entry["key"], entry["node"]) == ("key\nrotated", "ä=\n\x01", "x" * 5000)


def test_bytes_that_are_no_text_and_fields_that_come_twice(bed, volume):
    fields = {"MESSAGE": "odd", "MESSAGE_ID": MessageId.ROTATED.value, "LUKSROTD_UUID": volume}
    text = "".join(f"{name}={value}\n" for name, value in fields.items()).encode()
    run("logger", "--journald", data=text + b"LUKSROTD_KEY=a\xff\nLUKSROTD_CLIENT=one\nLUKSROTD_CLIENT=two\n")
    run("journalctl", "--sync")
    (entry,) = JournalHistory().entries(Query(volume))
    assert entry["key"] == "a\ufffd"
    assert entry["client"] in ("one", "two")


@contextmanager
def broken_sim():
    history = SimHistory(SimJournal())
    history.broken = "simulated"
    yield history


@contextmanager
def broken_real(monkeypatch):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("luksrotd.host.history._Reader", fail)
    yield JournalHistory()


@pytest.mark.parametrize("broken", ["sim", "journald"])
def test_a_journal_that_cannot_be_read(broken, monkeypatch):
    with broken_sim() if broken == "sim" else broken_real(monkeypatch) as history, pytest.raises(StateError):
        history.entries(Query())


def test_no_journal_is_no_history(private_run):
    assert subprocess.run(["journalctl", "--version"], capture_output=True, check=True).stdout
    assert list(JournalHistory().entries(Query(str(uuid.uuid4())))) == []
