# SPDX-License-Identifier: GPL-2.0-or-later
"""Header restore on a real volume, done wrongly: libcryptsetup itself shows what a crash then leaves.

Done as it is done, ``test_real_header.py`` judges it, like every verb.
"""

from collections.abc import Sequence

import pytest

from tests.support import forge
from tests.support.crash import Enumeration, Epoch, merged, swapped
from tests.support.crashverbs import SECRETS, backup_for
from tests.support.oracle import Libcryptsetup, Oracle
from tests.support.realvolume import Geometry, Recorded, recorded
from tests.support.simdisk import Write

VERB = "header restore, a keyslot moved"
MUTANTS = {
    "keyslots behind the first header": lambda epochs: swapped(epochs, 0),
    "keyslots and first header in one epoch": lambda epochs: merged(epochs, 0),
    "both headers in one epoch": lambda epochs: merged(epochs, 1),
    "the wipe before the second header": lambda epochs: swapped(epochs, 2),
}


def findings(operation: Recorded, epochs: Sequence[Epoch]) -> tuple[int, int]:
    """How many states there are, and in how many of them not all keys of one side open."""
    enumeration: Enumeration = operation.enumeration(epochs)
    with Libcryptsetup(operation.before, operation.geometry.headers, SECRETS) as tool:
        oracle = Oracle(tool, enumeration.starts[0], enumeration.starts[-1])
        judged = [bool(oracle.judge(image)) for image in enumeration.images()]
    return len(judged), sum(judged)


@pytest.mark.parametrize("name", MUTANTS)
def test_libcryptsetup_catches_mutants(name):
    operation = recorded(VERB)
    assert findings(operation, MUTANTS[name](operation.epochs))[1] > 0


def test_as_it_is_there_is_nothing_to_catch():
    operation = recorded(VERB)
    assert findings(operation, operation.epochs)[1] == 0


def test_what_cryptsetup_does_is_not_safe(report):
    """It writes the whole backup in one go, with one flush behind it (LUKS2_hdr_restore)."""
    operation = recorded(VERB, Geometry(sector=4096))
    backup = backup_for(operation.before[: operation.geometry.headers])
    states, wrong = findings(operation, [[Write(0, backup)]])
    assert wrong > 0
    report(f"real cryptsetup luksHeaderRestore: {states} crash states, in {wrong} not all keys of one side open")


def test_in_place_is_not_safe_either(report):
    """The phases, flushes and sequence number of ours, but the keyslots where they were in the backup."""
    operation = recorded(VERB)
    size = operation.geometry.headers // 2
    backup = forge.with_fields(backup_for(operation.before[: 2 * size]), seqid=90)
    areas = [Write(2 * size, backup[2 * size :])]
    states, wrong = findings(operation, [areas, [Write(0, backup[:size])], [Write(size, backup[size : 2 * size])]])
    assert wrong > 0
    report(f"real restore in place: {states} crash states, in {wrong} not all keys of one side open")
