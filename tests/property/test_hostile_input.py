# SPDX-License-Identifier: GPL-2.0-or-later
"""The properties of tests/fuzz without atheris: hostile headers, tokens, shadows and lines, as hypothesis chooses them.

Wherever we would write, real libcryptsetup must read the same header as we do.
"""

import json
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from luksrotd.luks2 import layout
from luksrotd.luks2.layout import Which
from tests.fuzz.volumes import VOLUMES
from tests.support import forge, hostile, mutation, shadows

CASES = shadows.cases()
EDITS = (
    {"edit": "add-keyslot", "keyslot": 3, "secret": "new", "pbkdf": {"type": "pbkdf2", "iterations": 1000}},
    {"edit": "set-token", "token": 2, "body": {"type": "x", "keyslots": ["1"]}, "fingerprint_of": 1},
    {"edit": "remove-token", "token": 1},
    {"ok": True, "result": {"a": 1}},
    {"ok": False, "error": "EngineFailed", "message": "cannot"},
)
TOKENS = [token for image in VOLUMES for token in forge.json_of(image)["tokens"].values()]
#: An example is the plan of a whole transaction, and every instant of it.
few = settings(max_examples=max(25, settings().max_examples // 2))
choices = st.randoms(use_true_random=False)


@given(st.sampled_from(VOLUMES), choices)
def test_a_header_altered_in_any_way(image, rng):
    altered = mutation.altered(rng, image)
    hostile.check_header(altered, len(altered))


@given(st.sampled_from(VOLUMES), st.sampled_from(VOLUMES), st.sampled_from(Which), st.integers(0, 31))
@example(VOLUMES[0], VOLUMES[3], Which.PRIMARY, 8)
@example(VOLUMES[0], VOLUMES[3], Which.SECONDARY, 8)
def test_a_copy_torn_between_two_headers(image, after, which, sectors):
    torn = forge.torn(image, forge.newer(after, forge.BOTH), which, sectors * layout.SECTOR)
    assert hostile.check_header(torn, len(torn)) is not None


@given(st.sampled_from(VOLUMES), st.sampled_from(VOLUMES), st.integers(-2, 2))
def test_two_copies_of_two_headers(image, other, by):
    start = forge.offset_of(image, Which.SECONDARY)
    mixed = forge.put(image, start, other[start : 2 * start])
    mixed = forge.newer(mixed, [Which.SECONDARY], by)
    assert hostile.check_header(mixed, len(mixed)) is not None


@given(st.sampled_from(VOLUMES), st.sampled_from(VOLUMES), choices)
def test_a_backup_altered_in_any_way(image, other, rng):
    hostile.check_backup(image, mutation.altered(rng, other))


@pytest.mark.parametrize("seqid", [2**64 - 2, 2**64 - 1])
def test_a_header_whose_sequence_number_cannot_rise_much(seqid):
    image = forge.with_fields(VOLUMES[0], seqid=seqid)
    assert hostile.check_header(image, len(image)) is not None
    hostile.check_backup(VOLUMES[0], image)


@given(st.sampled_from(TOKENS), choices)
def test_a_token_altered_in_any_way(token, rng):
    for _ in range(rng.randint(1, 3)):
        token = mutation.altered_json(rng, token)
    if isinstance(token, dict):
        hostile.check_token(token)


@given(st.sampled_from(VOLUMES), choices)
def test_the_text_of_a_json_area_altered_in_any_way(image, rng):
    hostile.check_text(mutation.altered_bytes(rng, forge.text_of(image)) + b"\0")


@given(st.sampled_from(EDITS), choices)
def test_a_line_altered_in_any_way(line, rng):
    for _ in range(rng.randint(0, 2)):
        line = mutation.altered_json(rng, line)
    text = json.dumps(line).encode()
    hostile.check_wire(mutation.altered_bytes(rng, text) if rng.random() < 0.2 else text)


@few
@given(st.sampled_from(CASES), choices)
def test_I4_a_shadow_altered_in_any_way(case, rng):
    shadows.check_plan(case, shadows.altered_shadow(rng, case))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_honest_shadow_is_planned(case):
    plan = shadows.check_plan(case, case.honest)
    assert plan is not None
    assert plan.final != plan.base


@pytest.mark.parametrize(
    "piece",
    [b"[],", b"{},", b'"",', b"0,", b"[[],[]],", b'{"a":[]},', b'"\\u0000",', b'"' + bytes(30).hex().encode() + b'",'],
    ids=lambda piece: piece.decode(),
)
def test_the_memory_that_a_header_costs_is_bounded(piece):
    """The largest header, filled with the smallest values: each of them is an object to Python."""
    size = layout.HEADER_SIZE_MAX
    head = forge.text_of(VOLUMES[0]).rstrip(b"}")
    room = size - layout.BINARY_SIZE - len(head) - 20
    text = head + b',"x":[' + piece * (room // len(piece)) + b"0]}"
    image = forge.put(VOLUMES[0], 8, size.to_bytes(8, "big")).ljust(2 * size, b"\0")
    image = forge.with_fields(image, [Which.PRIMARY], hdr_size=size)
    image = forge.with_text(image, text, [Which.PRIMARY])
    tracemalloc.start()
    try:
        hostile.seen_in(image, len(image))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 * size
