# SPDX-License-Identifier: GPL-2.0-or-later
"""Every crash state of every operation on a real volume, judged by real libcryptsetup: as it is, each valid copy alone,
after libcryptsetup's own recovery, and after reconcile."""

import pytest

from luksrotd.rotation.protocol import Phase
from tests.support.crash import Enumeration, Epoch, merged, moved, swapped
from tests.support.crashverbs import SECRETS, VERBS
from tests.support.examination import Examiner, complaint
from tests.support.oracle import Libcryptsetup, Oracle
from tests.support.realvolume import Geometry, recorded

#: One of each sequence of phases: on small sectors.  All others on large ones, which give fewer states.
FINE = ("rotation", "enrolment", "removal", "transaction: keyslots and tokens exchanged")
#: Reconciled by the real thing, too; the others here on simulated volumes only, and in the campaign (table.py).
RECONCILED = (*FINE, "staging", "finish", "other associated data", "reconcile of a wipe record")
COARSE = Geometry(sector=4096)
#: A few of all combinations, each value of each dimension at least once; tests/crash/table.py goes through all.
VARIANTS = [
    ("rotation", Geometry(bits=256, sector=4096, carrier="loop")),
    ("rotation", Geometry(metadata=64, carrier="loop")),
    ("rotation", Geometry(sector=4096, carrier="detached")),
    ("removal", Geometry(metadata=64, bits=256, sector=4096, carrier="detached")),
    ("enrolment", Geometry(metadata=4096, sector=4096)),
]


@pytest.mark.parametrize("verb", VERBS)
def test_libcryptsetup_finds_no_violation_in_any_state(verb, report):
    geometry = Geometry() if verb in FINE else COARSE
    found = Examiner(SECRETS, reconcile=verb in RECONCILED).examine(recorded(verb, geometry))
    assert complaint(found) == ""
    assert found.states > len(found.recorded.epochs)
    report(
        f"real {verb}, {geometry.sector}-byte sectors: {found.states} crash states judged by libcryptsetup "
        f"({found.loads} headers loaded), {found.reconciled} reconciled, 0 violations"
    )


@pytest.mark.parametrize(("verb", "geometry"), VARIANTS, ids=str)
def test_other_geometries(verb, geometry, report):
    found = Examiner(SECRETS).examine(recorded(verb, geometry))
    assert complaint(found) == ""
    report(f"real {verb}, {geometry}: {found.states} crash states, {found.reconciled} reconciled, 0 violations")


def test_the_worker_process_reconciles_alike():
    """The other tests reconcile in this process, for speed; here, one state of each epoch, by real workers."""
    operation = recorded("rotation")
    enumeration = operation.enumeration()
    states = [list(enumeration.crashes([epoch])) for epoch in range(len(operation.epochs))]
    images = [each[len(each) // 2].image(enumeration.starts[number]) for number, each in enumerate(states)]
    found = Examiner(SECRETS, worker=True).examine(operation, images)
    assert complaint(found) == ""
    assert found.reconciled == len(Phase)


@pytest.mark.parametrize("carrier", ["image", "loop", "detached"])
def test_a_rotation_makes_six_writes_and_six_flushes(carrier):
    operation = recorded("rotation", Geometry(carrier=carrier))
    assert len(operation.epochs) == len(Phase) == 6
    assert operation.writes <= 6
    assert operation.bytes <= 582_000


MUTANTS = {
    "flush after NEW_AREA dropped": ("rotation", lambda epochs: merged(epochs, 0)),
    "flush after HEADER_PRIMARY dropped": ("rotation", lambda epochs: merged(epochs, 1)),
    "flush after HEADER_SECONDARY dropped": ("rotation", lambda epochs: merged(epochs, 2)),
    "flush after CLEAR_PRIMARY dropped": ("rotation", lambda epochs: merged(epochs, 4)),
    "HEADER_PRIMARY before NEW_AREA": ("rotation", lambda epochs: swapped(epochs, 0)),
    "WIPE_OLD before HEADER_SECONDARY": ("rotation", lambda epochs: swapped(epochs, 2)),
    "WIPE_OLD first": ("rotation", lambda epochs: moved(epochs, 3, 0)),
    "removal: wipe first": ("removal", lambda epochs: moved(epochs, 2, 0)),
    "removal: wipe before the second header": ("removal", lambda epochs: swapped(epochs, 1)),
    "exchange: headers before the areas": (
        "transaction: keyslots and tokens exchanged", lambda epochs: moved(epochs, 0, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_libcryptsetup_catches_protocol_mutants(name):
    verb, mutate = MUTANTS[name]
    operation = recorded(verb, COARSE)
    mutant: list[Epoch] = mutate(operation.epochs)
    enumeration: Enumeration = operation.enumeration(mutant)
    with Libcryptsetup(operation.before, operation.geometry.headers, SECRETS) as tool:
        oracle = Oracle(tool, enumeration.starts[0], enumeration.starts[-1])
        assert any(oracle.judge(image) for image in enumeration.images())
