# SPDX-License-Identifier: GPL-2.0-or-later
"""Every crash state of the stepwise engine, and that both engines end in the same metadata; real libcryptsetup."""

import copy
from typing import Any

import pytest

from luksrotd.luks2.pair import parse_pair
from luksrotd.names import ATOMIC, STEPWISE
from tests.support import stepdriver
from tests.support.crash import Enumeration, merged, moved, swapped
from tests.support.makeimage import PBKDF, luks_dump_json, make_image
from tests.support.recorder import record
from tests.support.simulation import MAIN, OLD
from tests.support.stepcrash import BEFORE, MIB, StepwiseVerb, recorded


@pytest.fixture(scope="module")
def rotation(tmp_path_factory):
    return recorded("rotate", tmp_path_factory.mktemp("stepwise"))


@pytest.mark.parametrize("verb", BEFORE)
def test_no_crash_state_is_without_its_key_or_leaks_one(verb, tmp_path, report):
    done = recorded(verb, tmp_path)
    done.judge()
    done.reconcile()
    assert done.wrong == []
    report(f"stepwise {verb}: {done.states} crash states, {done.reconciled} headers reconciled, 0 violations")


def test_a_rotation_is_five_header_writes(rotation):
    """Each of two copies, each with its flush; the token, the keyslot with its area, the wipe, the token, the token."""
    size = parse_pair(rotation.enumeration.base).hdr_size
    starts = [min(write.offset for write in epoch) for epoch in rotation.enumeration.epochs]
    headers = [0, size]
    assert starts[0:2] == starts[3:5] == starts[6:8] == starts[8:10] == starts[10:12] == headers
    assert starts[2] != starts[5]
    assert min(starts[2], starts[5]) >= 2 * size
    assert len(starts) == 12


MUTANTS = {
    "the first flush dropped": lambda epochs: merged(epochs, 0),
    "the header before the area of the new keyslot": lambda epochs: swapped(epochs, 2),
    "the old area wiped before the birth": lambda epochs: moved(epochs, 5, 2),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_judge_sees_what_goes_wrong(name, rotation):
    real = rotation.enumeration
    mutant = StepwiseVerb("rotate", Enumeration(real.base, MUTANTS[name](real.epochs), real.headers))
    mutant.judge(until_wrong=True)
    assert mutant.wrong != []


def test_the_judge_sees_a_keyslot_that_leaks(tmp_path):
    """As cryptsetup's own commands leave it between them."""
    image = make_image(tmp_path / "volume.img", key=MAIN, keyslots_size=2 * MIB, size=4 * MIB)
    stepdriver.run(STEPWISE, "enroll", str(image))
    (tmp_path / "main").write_bytes(MAIN)
    (tmp_path / "old").write_bytes(OLD)
    command = ["cryptsetup", "-q", "luksAddKey", "--key-file", str(tmp_path / "main"), *PBKDF, str(image)]
    recording = record([*command, str(tmp_path / "old")], image)
    headers = 2 * parse_pair(recording.before).hdr_size
    leaking = StepwiseVerb("rotate", Enumeration(recording.before, recording.epochs[:-1], headers))
    leaking.judge(until_wrong=True)
    assert any("without a token" in what for what in leaking.wrong)


# ---- both engines


def by(engine: str, path, verbs) -> dict[str, Any]:
    """The metadata after ``verbs`` by ``engine``, without what is drawn by lot."""
    image = make_image(path / f"{engine}-{'-'.join(verbs)}.img", key=MAIN, keyslots_size=2 * MIB, size=4 * MIB)
    for verb in verbs:
        stepdriver.run(engine, verb, str(image))
    return plain(luks_dump_json(image))


def plain(metadata: dict[str, Any]) -> dict[str, Any]:
    """Without salts, offsets, the fingerprint, which follows from both, and the order of references."""
    metadata = copy.deepcopy(metadata)
    for keyslot in metadata["keyslots"].values():
        keyslot["kdf"]["salt"] = keyslot["area"]["offset"] = ""
    for token in metadata["tokens"].values():
        assert token.pop("fingerprint").startswith("sha256:")
    for digest in metadata["digests"].values():
        digest["keyslots"].sort()
        digest["salt"] = digest["digest"] = ""  # of the volume key: the images have been formatted apart
    return metadata


@pytest.mark.parametrize(
    "verbs",
    [
        ("enroll",),
        ("enroll", "stage"),
        ("enroll", "stage", "finish"),
        ("enroll", "stage", "abort"),
        ("enroll", "remove"),
    ],
    ids="-".join,
)
def test_both_engines_end_in_the_same_metadata(verbs, tmp_path):
    assert by(STEPWISE, tmp_path, verbs) == by(ATOMIC, tmp_path, verbs)


def test_a_rotation_in_steps_ends_as_stage_and_finish_do(tmp_path):
    assert by(STEPWISE, tmp_path, ["enroll", "rotate"]) == by(ATOMIC, tmp_path, ["enroll", "stage", "finish"])


def test_a_rotation_ends_alike_but_for_the_number_of_its_token(tmp_path):
    stepwise, atomic = (by(engine, tmp_path, ["enroll", "rotate"]) for engine in (STEPWISE, ATOMIC))
    assert list(stepwise["tokens"].values()) == list(atomic["tokens"].values())
    assert stepwise | {"tokens": {}} == atomic | {"tokens": {}}


def test_engines_may_take_turns(tmp_path):
    image = make_image(tmp_path / "volume.img", key=MAIN, keyslots_size=2 * MIB, size=4 * MIB)
    for engine, verb in [
        (ATOMIC, "enroll"),
        (STEPWISE, "stage"),
        (ATOMIC, "abort"),
        (ATOMIC, "stage"),
        (STEPWISE, "finish"),
        (ATOMIC, "remove"),
    ]:
        stepdriver.run(engine, verb, str(image))
    metadata = luks_dump_json(image)
    assert (list(metadata["keyslots"]), metadata["tokens"]) == (["0"], {})
