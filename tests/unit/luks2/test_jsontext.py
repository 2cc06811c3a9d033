# SPDX-License-Identifier: GPL-2.0-or-later
import json

import pytest

from luksrotd.errors import FormatError
from luksrotd.luks2 import jsontext


def test_members_keep_their_order():
    assert list(jsontext.load(b'{"b":1,"a":2}\0')) == ["b", "a"]


@pytest.mark.parametrize(
    ("area", "message"),
    [
        (b"", "does not start"),
        (b'{"a":1}', "not terminated"),
        (b'{"a":1}x\0', "not JSON"),
        (b'{"a":\xff}\0', "not JSON"),
        (b'{"a":1,"a":1}\0', "twice"),
        (b'{"a":NaN}\0', "NaN is not JSON"),
        (b'{"a":' + b"[" * 100_000 + b"\0", "nested too deeply"),
        (b'{"a":{"b":[' + b"[" * 30 + b"]" * 30 + b"]}}\0", "nested too deeply"),
        (b'{"\\u0000":1}\0', "has a NUL"),
        (b'{"a":["\\udc00"]}\0', "lone surrogate"),
        (b'{"a":18446744073709551616}\0', "64 bits"),
        (b'{"a":-9223372036854775809}\0', "64 bits"),
        (b'{"a":[1, 99999999999999999999]}\0', "64 bits"),
        (b'{"a":1e999}\0', "double"),
        (b'{"a":[-17.5E+309]}\0', "double"),
        (b'{"a":\n' + b"9" * 310 + b".0}\0", "double"),
    ],
)
def test_refused(area, message):
    with pytest.raises(FormatError, match=message):
        jsontext.load(area)


@pytest.mark.parametrize("text", ["9007199254740993", "1e99", "-999999999999999999e99", '"1e999"', "[" * 31 + "]" * 31])
def test_kept_as_it_is(text):
    assert jsontext.load(b'{"a":%s}\0' % text.encode()) == {"a": json.loads(text)}


def test_walk_counts_levels_and_finds_names():
    assert sorted(jsontext.walk({"a": [1]}), key=str) == sorted([({"a": [1]}, 1), ("a", 1), ([1], 2), (1, 3)], key=str)


@pytest.mark.parametrize("value", ["é😀", "", 0, True, None, -(2**63), 2**64 - 1, 1.5, [], {}])
def test_no_trouble_with_what_json_c_keeps(value):
    assert jsontext.trouble(value) == ""


@pytest.mark.parametrize("value", ["0", "[]", "{}", '{"a":0}'])
def test_too_many_values_are_refused_before_they_are_made(value):
    most = jsontext.VALUES_MAX // sum(value.count(sign) + (sign == ",") for sign in ",:[{")
    assert jsontext.load(area(value, most - 10))
    with pytest.raises(FormatError, match="too many values"):
        jsontext.load(area(value, most + 10))


def area(value: str, times: int) -> bytes:
    return b'{"x":[%s]}\0' % ",".join([value] * times).encode()
