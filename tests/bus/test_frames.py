# SPDX-License-Identifier: GPL-2.0-or-later
"""Headers and properties as bytes: as dbus-next writes and reads them."""

import pytest
from dbus_next._private.constants import HeaderField
from dbus_next._private.marshaller import Marshaller
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.errors import SignatureBodyMismatchError
from dbus_next.message import Message
from dbus_next.signature import Variant
from hypothesis import given
from hypothesis import strategies as st

from luksrotd.bus import frames

WORD = st.text("abcXYZ_", min_size=1, max_size=20)
DOTTED = st.lists(WORD, min_size=2, max_size=4).map(".".join)
PATH = st.lists(WORD, max_size=4).map(lambda words: "/" + "/".join(words))
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
VARIANT = st.one_of(
    TEXT.map(lambda value: Variant("s", value)),
    st.booleans().map(lambda value: Variant("b", value)),
    st.integers(0, 2**64 - 1).map(lambda value: Variant("t", value)),
    st.lists(TEXT, max_size=3).map(lambda value: Variant("as", value)),
    st.lists(st.tuples(st.integers(0, 9), TEXT).map(list), max_size=3).map(lambda value: Variant("a(us)", value)),
)
PROPERTIES = st.dictionaries(TEXT, VARIANT, max_size=5)
BODY = st.one_of(
    st.just(("", [])),
    TEXT.map(lambda value: ("s", [value])),
    st.tuples(TEXT, PROPERTIES).map(lambda both: ("sa{sv}", list(both))),
    st.just(("h", [0])),
)
SERIAL = st.integers(1, 2**32 - 1)
ATTRIBUTES = (
    *("destination", "path", "interface", "member", "message_type", "flags", "error_name", "reply_serial", "sender"),
    *("unix_fds", "signature", "serial"),
)


@st.composite
def messages(draw):
    signature, body = draw(BODY)
    kind = draw(st.sampled_from([kind for kind in MessageType if kind is not MessageType.ERROR] + [MessageType.ERROR]))
    answer = kind in (MessageType.METHOD_RETURN, MessageType.ERROR)
    return Message(
        destination=draw(st.none() | DOTTED),
        path=None if answer else draw(PATH),
        interface=None if answer else draw(DOTTED),
        member=None if answer else draw(WORD),
        error_name=draw(DOTTED) if kind is MessageType.ERROR else None,
        reply_serial=draw(SERIAL) if answer else None,
        message_type=kind,
        flags=MessageFlag(draw(st.integers(0, 7))),
        unix_fds=[5, 6] if signature == "h" else [],
        signature=signature,
        body=body,
        serial=draw(SERIAL),
    )


def told(message):
    return {name: getattr(message, name) for name in ATTRIBUTES}


def with_sender(message, sender):
    """The frame as the bus hands it on: dbus-next writes no sender."""
    frame = frames.frame(message)
    length = int.from_bytes(frame[12:16], "little")
    fields = frame[16 : 16 + length]
    fields += (
        bytes(-len(fields) % 8) + bytes((7, 1)) + b"s\0" + len(sender).to_bytes(4, "little") + sender.encode() + b"\0"
    )
    rest = frame[16 + -(-length // 8) * 8 :]
    return frame[:12] + len(fields).to_bytes(4, "little") + fields + bytes(-len(fields) % 8) + rest, len(fields)


@given(messages())
def test_frames_are_what_dbus_next_would_send(message):
    assert frames.frame(message) == message._marshall(negotiate_unix_fd=True)


@given(messages(), st.none() | st.sampled_from([":1.7", ":1.1234567"]))
def test_headers_are_read_as_dbus_next_reads_them(message, sender):
    if sender is None:
        frame = frames.frame(message)
        length = int.from_bytes(frame[12:16], "little")
    else:
        frame, length = with_sender(message, sender)
    theirs = Unmarshaller(None)
    theirs.buf = frame
    read = told(theirs.unmarshall())
    ours = frames.fields_of(frame, length)
    assert ours is not None
    assert {"signature": "", **ours} == {name: read[name] for name in {"signature", *ours}}
    assert all(
        read[name] is None for name in ("destination", "path", "interface", "member", "sender") if name not in ours
    )


@given(messages(), st.data())
def test_what_is_odd_in_a_header_is_left_to_dbus_next(message, data):
    frame = frames.frame(message)
    length = int.from_bytes(frame[12:16], "little")
    at = data.draw(st.integers(16, 15 + max(length, 1)))
    frame[at] = data.draw(st.integers(0, 255))
    theirs = Unmarshaller(None)
    theirs.buf = bytearray(frame)
    try:
        read = told(theirs.unmarshall())
    except Exception:  # noqa: BLE001 - whatever dbus-next says of it
        return
    ours = frames.fields_of(frame, length)
    if ours is not None:
        assert {name: read[name] for name in ours} == ours


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_header_that_does_not_end_with_a_field_is_none(cut):
    frame = frames.frame(Message("a.b", "/x", "c.d", "E", serial=1))
    length = int.from_bytes(frame[12:16], "little")
    assert frames.fields_of(frame, length) is not None
    assert frames.fields_of(frame[:-cut], length + 8) is None


@given(PROPERTIES)
def test_properties_are_what_dbus_next_would_send(properties):
    assert frames.dictionary(frames.entries(properties)) == Marshaller("a{sv}", [properties]).marshall()


@given(st.dictionaries(PATH, st.dictionaries(DOTTED, PROPERTIES, max_size=3), max_size=4))
def test_so_are_those_of_all_objects(objects):
    found = {
        path: [(name, frames.entries(properties)) for name, properties in interfaces.items()]
        for path, interfaces in objects.items()
    }
    assert frames.managed(found) == Marshaller("a{oa{sa{sv}}}", [objects]).marshall()


def test_an_answer_that_is_prepared():
    call = Message("a.b", "/x", "c.d", "E", serial=9, sender=":1.2")
    properties = {"A": Variant("s", "x")}
    plain = Message.new_method_return(call, "a{sv}", [properties])
    prepared = frames.Prepared(call, "a{sv}", frames.dictionary(frames.entries(properties)))
    assert frames.frame(prepared) == plain._marshall()
    assert HeaderField.REPLY_SERIAL.value == frames._REPLY_SERIAL


def test_what_does_not_fit_its_signature_is_refused():
    with pytest.raises(SignatureBodyMismatchError):
        frames.frame(Message("a.b", "/x", "c.d", "E", signature="u", body=["text"], serial=1))
    with pytest.raises(SignatureBodyMismatchError):
        frames.entries({"A": 3})
