# SPDX-License-Identifier: GPL-2.0-or-later
import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luksrotd import errors
from luksrotd.rotation import wire

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(JSON)
@settings(max_examples=50)
def test_results_come_back(result):
    line = wire.success(result)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert wire.result_of(line) == result


@given(st.dictionaries(st.text(), JSON))
@settings(max_examples=50)
def test_requests_come_back(request):
    assert wire.decode(wire.encode(request)) == request


@pytest.mark.parametrize("code", sorted(wire.CODES))
def test_errors_come_back(code):
    kind = errors.leaves()[code]
    with pytest.raises(kind, match=r"^cannot do it$") as caught:
        wire.result_of(wire.failure(kind("cannot do it")))
    assert type(caught.value) is kind


@given(st.binary() | st.dictionaries(st.sampled_from(["ok", "error", "message"]), JSON).map(wire.encode))
@settings(max_examples=50)
def test_any_bytes_give_a_result_or_an_engine_error(line):
    with contextlib.suppress(errors.EngineError):
        wire.result_of(line)


@pytest.mark.parametrize("code", [*sorted(set(errors.leaves()) - wire.CODES), "", "nonsense"])
def test_other_codes_are_not_a_workers_to_claim(code):
    line = json.dumps({"ok": False, "error": code, "message": "cannot"}).encode()
    with pytest.raises(errors.EngineError, match=r"^cannot understand the worker: it says "):
        wire.result_of(line)


@pytest.mark.parametrize("reply", [{}, {"ok": 1}, {"ok": None}, {"ok": False}, {"ok": False, "error": "Internal"}])
def test_malformed_replies(reply):
    with pytest.raises(errors.EngineError, match=r"malformed reply"):
        wire.result_of(json.dumps(reply).encode())


@pytest.mark.parametrize("value", [float("nan"), b"bytes", {1: 2}.keys()])
def test_what_is_not_json_is_not_sent(value):
    with pytest.raises(errors.InvalidRequest, match=r"not JSON"):
        wire.encode({"op": value})


def test_lines_have_a_limit():
    with pytest.raises(errors.InvalidRequest, match=r"longer than"):
        wire.encode({"op": "x" * wire.MAX_LINE})


def test_messages_are_cut_and_cleaned():
    line = json.dumps({"ok": False, "error": "EngineFailed", "message": "\x1b[2J\n" + "x" * 1000}).encode()
    with pytest.raises(errors.EngineError) as caught:
        wire.result_of(line)
    assert caught.value.message == "?[2J?" + "x" * 495


@pytest.mark.parametrize("line", [b"[]", b"7", b'"ok"', b"null", b"not json", b"\xff", b"[" * 100_000])
def test_what_is_no_object_is_no_reply(line):
    with pytest.raises(errors.EngineError, match=r"^cannot understand the worker: not "):
        wire.result_of(line)
