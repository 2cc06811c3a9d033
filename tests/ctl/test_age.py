# SPDX-License-Identifier: GPL-2.0-or-later
"""--older-than: a key is rotated when it is due, once, and left alone before."""

import json
import subprocess
from datetime import UTC, datetime, timedelta

import pytest

from luksrotd.rotation.token import utc
from tests.ctl.conftest import BACKUP, CHEAP, LUKSROTCTL, NEXT, die_with_parent, environment, fails, our_tokens, works
from tests.support.escrow import Escrow
from tests.support.makeimage import KEY, cryptsetup_opens, import_token, run


def rotated_ago(image, **since):
    """Make it so; no time at all without a period."""
    [token] = our_tokens(image)
    token["rotated_at"] = utc(datetime.now(UTC) - timedelta(**since)) if since else ""
    run("token", "remove", "--token-id", "0", str(image))
    import_token(image, token, 0)


def rotation(image, secret, *more):
    return ("--direct", "rotate", image, "-d", secret(KEY), "--new-keyfile", secret(NEXT), *CHEAP, *more)


@pytest.mark.parametrize(
    ("since", "age"),
    [
        ({"days": 90, "seconds": 1}, "90d"),
        ({"minutes": 45}, "45m"),
        ({"hours": 13}, "12h"),
        ({"days": 99}, "6w"),
        ({}, "9w"),
    ],
)
def test_what_is_due_is_rotated(enrolled, secret, since, age):
    rotated_ago(enrolled, **since)
    works(*rotation(enrolled, secret, "--older-than", age))
    assert our_tokens(enrolled)[0]["generation"] == 2
    assert (cryptsetup_opens(enrolled, NEXT), cryptsetup_opens(enrolled, BACKUP)) == (True, False)
    before = enrolled.read_bytes()
    works(*rotation(enrolled, secret, "--older-than", age))
    assert enrolled.read_bytes() == before, "it is new now"


@pytest.mark.parametrize(
    ("since", "warns"), [({"days": 89, "hours": 23}, False), ({"seconds": 0}, False), ({"hours": -1}, True)]
)
def test_what_is_not_due_is_left_alone(enrolled, since, warns):
    """No key is asked for, either: there is none, and no terminal."""
    rotated_ago(enrolled, **since)
    before, [token] = enrolled.read_bytes(), our_tokens(enrolled)
    words = ("--direct", "rotate", enrolled, "--older-than", "90d", "--generate", "--escrow", "/bin/true")
    told = json.loads(works(*words, "--json"))
    assert told.pop("warning", "").startswith("it was rotated in the future") == warns
    due_at = utc(datetime.fromisoformat(token["rotated_at"]) + timedelta(days=90))
    assert told == {
        "device": str(enrolled), "name": "backup", "generation": 1, "keyslot": 1,
        "rotated_at": token["rotated_at"], "due_at": due_at, "outcome": "unchanged",
    }  # fmt: skip
    text = works(*words)
    assert f"is not due: rotated at {token['rotated_at']}, due at {due_at}" in text
    assert ("warning: " in text) == warns
    assert enrolled.read_bytes() == before


def test_a_file_that_is_for_the_key_gets_no_message(enrolled, tmp_path):
    rotated_ago(enrolled, days=1)
    words = ("--direct", "rotate", enrolled, "-d", "/nowhere", "--older-than", "90d", "--generate")
    assert works(*words) == ""
    assert "is not due" in works(*words, "--output", tmp_path / "new.key")
    assert not (tmp_path / "new.key").exists()


def test_what_makes_no_sense(enrolled, secret):
    for age in ("never", "0d", "90", "d", "-1d", "1.5d", ""):
        assert "--older-than" in fails(2, *rotation(enrolled, secret, "--older-than", age))["message"]
    assert fails(2, "--direct", "enroll", enrolled, "--older-than", "90d")["error"] == "InvalidArgs"
    other = ("--older-than", "90d", "--name", "other")
    assert fails(1, *rotation(enrolled, secret, *other))["error"] == "UnknownKey"


def test_one_that_a_person_must_look_at_is_not_hidden_by_its_age(enrolled, secret):
    [token] = our_tokens(enrolled)
    import_token(enrolled, {**token, "keyslots": []}, 7)
    assert fails(3, *rotation(enrolled, secret, "--older-than", "90d"))["error"] == "NeedsPerson"


def test_two_at_once_rotate_once(enrolled, secret, tmp_path):
    """Both have found it due, and have given a key away: one of them wins."""
    rotated_ago(enrolled, days=100)
    escrow = Escrow(tmp_path / "escrow")
    # The first waits until the second one is there, and the second one until the first has ended.
    first = (
        'mkdir "$0.first" 2>/dev/null && { echo $PPID >"$0.pid"; until [ -e "$0.second" ]; do sleep 0.1; done; exit; }'
    )
    lives = 'grep -q "^State:.[^ZX]" "/proc/$(cat "$0.pid")/status" 2>/dev/null'
    second = f'until [ -s "$0.pid" ]; do sleep 0.1; done; echo >"$0.second"; while {lives}; do sleep 0.1; done'
    escrow.does(f"{first} || true\n{second}", takes='cat >"$0.key.$$"\n')
    more = ("--older-than", "90d", "--generate", "--escrow", str(escrow.path))
    argv = [*LUKSROTCTL, "--direct", "rotate", str(enrolled), "-d", str(secret(KEY)), *more, "--json"]
    start = {"env": environment(), "stdout": subprocess.PIPE, "preexec_fn": die_with_parent}
    with subprocess.Popen(argv, **start) as one, subprocess.Popen(argv, **start) as other:
        told = [json.loads(process.communicate()[0]) for process in (one, other)]
    assert sorted([one.returncode, other.returncode]) == [0, 6]
    assert sorted(document["outcome"] for document in told) == ["committed", "unchanged"]
    assert our_tokens(enrolled)[0]["generation"] == 2
    keys = [path.read_bytes() for path in escrow.path.parent.glob("escrow.key.*")]
    assert sorted(cryptsetup_opens(enrolled, key) for key in keys) == [False, True]
    works(*argv[len(LUKSROTCTL) :])
    assert our_tokens(enrolled)[0]["generation"] == 2
