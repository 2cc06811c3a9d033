# SPDX-License-Identifier: GPL-2.0-or-later
import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luksrotd.errors import InvalidRequest, Outcome
from luksrotd.rotation.edits import (
    MAX_MEMORY_KIB,
    MAX_PARALLEL,
    MIN_ITERATIONS,
    MIN_MEMORY_KIB,
    PBKDF_FOR_RANDOM_KEYS,
    PBKDF_TYPES,
    AddKeyslot,
    DestroyKeyslot,
    Pbkdf,
    RemoveToken,
    SetToken,
    from_wire,
    to_wire,
)

numbers = st.integers(0, 31)
hashes = st.none() | st.sampled_from(["sha256", "sha512"])


def iterations(kind: str) -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(MIN_ITERATIONS[kind], 2**32 - 1)


pbkdfs = st.builds(Pbkdf, st.just("pbkdf2"), hashes, iterations("pbkdf2")) | st.builds(
    Pbkdf,
    st.sampled_from(["argon2i", "argon2id"]),
    hashes,
    iterations("argon2id"),
    st.none() | st.integers(MIN_MEMORY_KIB, MAX_MEMORY_KIB),
    st.none() | st.integers(1, MAX_PARALLEL),
)
values = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
edits = st.one_of(
    st.builds(AddKeyslot, numbers, st.text(max_size=5), pbkdfs, st.none() | numbers),
    st.builds(SetToken, numbers, st.dictionaries(st.text(max_size=5), values, max_size=3), st.none() | numbers),
    st.builds(RemoveToken, numbers),
    st.builds(DestroyKeyslot, numbers),
)


@given(edits)
def test_every_edit_survives_the_wire(edit):
    assert from_wire(json.loads(json.dumps(to_wire(edit)))) == edit


@pytest.mark.parametrize(
    ("edit", "wire"),
    [
        (
            AddKeyslot(3, "new", Pbkdf("pbkdf2", "sha512", 1000)),
            {
                "edit": "add-keyslot",
                "keyslot": 3,
                "secret": "new",
                "pbkdf": {
                    "type": "pbkdf2",
                    "hash": "sha512",
                    "iterations": 1000,
                    "memory_kib": None,
                    "parallel": None,
                },
            },
        ),
        (
            SetToken(1, {"type": "luksrotd"}, 3),
            {"edit": "set-token", "token": 1, "body": {"type": "luksrotd"}, "fingerprint_of": 3},
        ),
        (RemoveToken(1), {"edit": "remove-token", "token": 1}),
        (DestroyKeyslot(0), {"edit": "destroy-keyslot", "keyslot": 0}),
    ],
)
def test_the_wire_form_is_fixed(edit, wire):
    assert to_wire(edit) == wire
    assert from_wire(wire) == edit


def test_the_body_on_the_wire_is_a_copy():
    body = {"type": "luksrotd"}
    to_wire(SetToken(1, body))["body"]["type"] = "changed"
    assert body == {"type": "luksrotd"}


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        ({}, "malformed"),
        ({"edit": "format"}, "unknown kind 'format'"),
        ({"edit": None}, "unknown kind None"),
        ({"edit": "remove-token"}, "malformed"),
        ({"edit": "remove-token", "token": None}, "malformed"),
        ({"edit": "remove-token", "token": "x"}, "malformed"),
        ({"edit": "remove-token", "token": float("inf")}, "malformed"),
        ({"edit": "set-token", "token": 1, "body": None, "fingerprint_of": None}, "malformed"),
        ({"edit": "add-keyslot", "keyslot": 1, "secret": "new", "pbkdf": None}, "malformed"),
        ({"edit": "add-keyslot", "keyslot": 1, "secret": "new", "pbkdf": {"cost": 1}}, "malformed"),
        ({"edit": "add-keyslot", "keyslot": 1, "secret": "new", "pbkdf": {"type": "none"}}, "key derivation 'none'"),
    ],
)
def test_what_to_wire_did_not_write_is_refused(wire, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        from_wire(wire)
    assert caught.value.outcome is Outcome.UNCHANGED


@given(
    st.sampled_from(["add-keyslot", "set-token", "remove-token", "destroy-keyslot"]),
    st.dictionaries(st.sampled_from(["keyslot", "token", "secret", "body", "fingerprint_of", "pbkdf"]), values),
)
def test_no_other_error_for_any_json(kind, members):
    with suppress(InvalidRequest):
        from_wire({"edit": kind} | members)


@pytest.mark.parametrize("kind", PBKDF_TYPES)
def test_forced_iterations_are_bounded(kind):
    least = MIN_ITERATIONS[kind]
    assert Pbkdf(kind, iterations=least).iterations == least
    assert Pbkdf(kind, iterations=2**32 - 1).iterations == 2**32 - 1
    for wrong in (least - 1, 2**32):
        with pytest.raises(InvalidRequest, match=f"cannot use {wrong} iterations: {kind} takes at least {least}"):
            Pbkdf(kind, iterations=wrong)


def test_memory_is_bounded():
    for right in (MIN_MEMORY_KIB, MAX_MEMORY_KIB):
        assert Pbkdf(memory_kib=right).memory_kib == right
    for wrong in (MIN_MEMORY_KIB - 1, MAX_MEMORY_KIB + 1):
        with pytest.raises(InvalidRequest, match=f"cannot use {wrong} KiB"):
            Pbkdf(memory_kib=wrong)


def test_threads_are_bounded():
    for right in (1, MAX_PARALLEL):
        assert Pbkdf(parallel=right).parallel == right
    for wrong in (0, MAX_PARALLEL + 1):
        with pytest.raises(InvalidRequest, match=f"cannot use {wrong} threads"):
            Pbkdf(parallel=wrong)


@pytest.mark.parametrize("cost", [{"memory_kib": MIN_MEMORY_KIB}, {"parallel": 1}])
def test_pbkdf2_has_neither_memory_nor_threads(cost):
    with pytest.raises(InvalidRequest, match="only argon2 takes them"):
        Pbkdf("pbkdf2", **cost)


def test_unknown_derivations_are_refused_by_name():
    with pytest.raises(InvalidRequest, match=r"'scrypt': it must be one of argon2id, argon2i, pbkdf2"):
        Pbkdf("scrypt")


def test_defaults():
    assert Pbkdf() == Pbkdf("argon2id", None, None, None, None)
    assert AddKeyslot(1) == AddKeyslot(1, "new", Pbkdf())
    assert Pbkdf("pbkdf2", "sha512", 1000) == PBKDF_FOR_RANDOM_KEYS
