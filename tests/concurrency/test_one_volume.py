# SPDX-License-Identifier: GPL-2.0-or-later
"""Eight processes of ours and eight of cryptsetup change one volume at once, and nothing is lost.

Bounded by completion: every change but those of luksrotctl, which does not wait for other jobs, is tried until it is
through.  Nobody waits for a time.
"""

import json
import subprocess
import sys
import threading
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from luksrotd.luks2.pair import parse_pair
from luksrotd.rotation.view import view
from tests.concurrency.driver import secret
from tests.contract.conftest import loop_device
from tests.ctl.conftest import CHEAP, LUKSROTCTL, die_with_parent, environment
from tests.support.makeimage import KEY, cryptsetup_opens, make_image

DRIVERS = [f"driver{number}" for number in range(4)]
CLIENTS = [f"client{number}" for number in range(4)]
STRANGERS = range(8)
ROUNDS = 1
ATTEMPTS = 2
#: Keyslot and token of a process of cryptsetup: beyond what ours need.
FIRST = 20
BUSY = 6
#: The verbs that make a generation.
NEW_KEYS = ("enroll", "rotate", "stage")
RIVAL = "Detected attempt for concurrent LUKS2 metadata update"


class Storm:
    """What all have reported, in no order."""

    def __init__(self, path, directory):
        self.path = str(path)
        self.main = self._file(directory, "main", KEY)
        self.told = []
        """Of each change of ours: name, verb, generation, sequence numbers; or the error."""
        self.updates = 0
        """How often cryptsetup has changed the header."""
        self.refused = 0
        """How often cryptsetup has found somebody else at it, and changed nothing."""
        self.failures = []
        self._directory = directory
        self._lock = threading.Lock()

    def file(self, name, content):
        return self._file(self._directory, name, content)

    @staticmethod
    def _file(directory, name, content):
        path = directory / name
        path.write_bytes(content)
        return str(path)

    def tell(self, name, **fields):
        with self._lock:
            self.told.append({"name": name, **fields})

    def cryptsetup(self, *arguments, stdin=b"", updates=1):
        """A command of cryptsetup, tried until nobody else has been at it meanwhile."""
        while True:
            command = ["cryptsetup", "--batch-mode", *arguments]
            done = subprocess.run(command, input=stdin, capture_output=True, check=False, preexec_fn=die_with_parent)
            with self._lock:
                self.updates += updates if done.returncode == 0 else 0
                self.refused += done.returncode != 0
            if done.returncode == 0:
                return done.stdout
            assert RIVAL in done.stderr.decode(), (command, done.stderr)


def drive(storm, name):
    """A process that works with the use cases."""
    command = [sys.executable, "-P", "-m", "tests.concurrency.driver", storm.path, name, str(ROUNDS)]
    done = subprocess.run(command, capture_output=True, check=False, env=environment(), preexec_fn=die_with_parent)
    assert done.returncode == 0, done.stderr.decode()
    for line in done.stdout.splitlines():
        storm.tell(name, **json.loads(line))


def luksrotctl(storm, *arguments):
    """Its exit status and the document that it prints."""
    command = [*LUKSROTCTL, "--direct", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, check=False, env=environment(), preexec_fn=die_with_parent)
    assert done.returncode in (0, BUSY), (command, done.stdout, done.stderr)
    return done.returncode, json.loads(done.stdout)


def change(storm, name, verb, number):
    """Enrol or rotate a key by luksrotctl; whether it got its turn."""
    new = storm.file(f"{name}-{number}", secret(name, number))
    keys = ("--key-file", storm.main, "--new-keyfile", new, "--data", json.dumps({"of": number}))
    status, document = luksrotctl(storm, verb, storm.path, "--name", name, *keys, *CHEAP)
    if status:
        storm.tell(name, verb=verb, error=document["error"], outcome=document["outcome"])
        return False
    seqids = {"before": document["seqid_before"], "after": document["seqid_after"]}
    storm.tell(name, verb=verb, generation=document["generation"], **seqids)
    return True


def call(storm, name):
    """luksrotctl, again and again; it does not wait while another job has the volume."""
    generation = 1  # it is enrolled
    for _ in range(ATTEMPTS):
        generation += change(storm, name, "rotate", generation + 1)
        held = storm.file(f"{name}-{generation}", secret(name, generation))
        status, document = luksrotctl(storm, "verify", storm.path, "--name", name, "--key-file", held)
        assert status or document["matches"] is True, document
        luksrotctl(storm, "reconcile", storm.path)


def intrude(storm, number):
    """cryptsetup, with a keyslot and a token of its own."""
    slot = str(FIRST + number)
    for round_ in range(ROUNDS + 1):
        key = f"stranger {number}, round {round_}".encode()
        file = storm.file(f"stranger-{number}-{round_}", key)
        cheap = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-slot", slot)
        storm.cryptsetup("luksAddKey", "--key-file", storm.main, *cheap, storm.path, file)
        opened = ("open", "--test-passphrase", "--key-slot", slot, "--key-file", file, storm.path)
        storm.cryptsetup(*opened, updates=0)
        token = json.dumps({"type": "stranger", "keyslots": [slot], "round": round_}).encode()
        storm.cryptsetup("token", "import", "--token-id", slot, storm.path, stdin=token)
        dump = json.loads(storm.cryptsetup("luksDump", "--dump-json-metadata", storm.path, updates=0))
        assert dump["tokens"][slot]["round"] == round_
        if round_ < ROUNDS:
            storm.cryptsetup("token", "remove", "--token-id", slot, storm.path)
            storm.cryptsetup("luksKillSlot", "--key-file", storm.main, storm.path, slot)


def all_at_once(storm, *jobs):
    """Each in a thread, from one start; their errors."""
    start = threading.Barrier(len(jobs))

    def work(job, who):
        start.wait()
        try:
            job(storm, who)
        except BaseException as error:  # noqa: BLE001 - shown below
            storm.failures.append((who, error))

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storm.failures == []


def header(path):
    """Both header copies, as libcryptsetup and we read them."""
    with Path(path).open("rb") as file:
        return parse_pair(file.read())


@pytest.fixture(params=["image", "loop device"])
def storm(request, tmp_path):
    image = make_image(tmp_path / "image")
    with ExitStack() as stack:
        path = stack.enter_context(loop_device(image)) if request.param == "loop device" else image
        yield Storm(path, tmp_path)


def test_nothing_is_lost(storm):
    for name in CLIENTS:
        assert change(storm, name, "enroll", 1)
    first = header(storm.path).winner.header.seqid
    jobs = [(drive, name) for name in DRIVERS] + [(call, name) for name in CLIENTS]
    begun = len(storm.told)
    all_at_once(storm, *jobs, *((intrude, number) for number in STRANGERS))
    told = storm.told[begun:]
    done = [each for each in told if "error" not in each]
    failed = {(each["error"], each["outcome"]) for each in told if "error" in each}
    assert failed <= {("Busy", "unchanged"), ("Conflict", "unchanged"), ("LockTimeout", "unchanged")}

    in_order = sorted(done, key=lambda each: each["before"])
    # One after the other, each on what the one before has left; nobody has gone back.
    for one, next_one in pairwise(in_order):
        assert one["before"] < one["after"] <= next_one["before"]
    pair = header(storm.path)
    assert pair.agree
    # Every update is there, none was overwritten by another: the sequence number counts them all.
    ours = sum(each["after"] - each["before"] for each in done)
    assert pair.winner.header.seqid - first == ours + storm.updates

    seen = view(pair)
    assert seen.pending == ()
    keys = {key.token.name: key for key in seen.keys}
    assert sorted(keys) == sorted(DRIVERS + CLIENTS)
    for name, key in keys.items():
        generations = [each["generation"] for each in in_order if each["name"] == name and each["verb"] in NEW_KEYS]
        last = 2 * ROUNDS + 1 if name in DRIVERS else len(generations) + 1
        assert generations == list(range(1 if name in DRIVERS else 2, last + 1))
        assert key.complete
        assert (key.token.generation, key.token.data["of"]) == (last, last)
        assert cryptsetup_opens(storm.path, secret(name, last), key.keyslot.id)
        assert not any(cryptsetup_opens(storm.path, secret(name, old)) for old in range(max(1, last - 1), last))
    for number in STRANGERS:
        assert cryptsetup_opens(storm.path, f"stranger {number}, round {ROUNDS}".encode(), FIRST + number)
        assert seen.metadata.tokens[FIRST + number].raw["round"] == ROUNDS
    assert sorted(seen.metadata.keyslots) == sorted(
        [0, *(key.keyslot.id for key in keys.values()), *(FIRST + number for number in STRANGERS)]
    )
    for name in CLIENTS:  # nobody is in the way any more
        assert change(storm, name, "rotate", keys[name].token.generation + 1)
