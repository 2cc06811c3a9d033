# SPDX-License-Identifier: GPL-2.0-or-later
"""Any text at all is a configuration, or an error that says where."""

import re

from hypothesis import example, given
from hypothesis import strategies as st

from luksrotd.config import Config
from luksrotd.configfile import KEYS, ConfigText, parse
from luksrotd.errors import ConfigError
from luksrotd.rotation.edits import Pbkdf

SOME = (
    *("", "0", "1", "4", "100000", "-1", "1e3", "50%", "%", "1G", "9T", "K", "5min", "2h 3", "never", "yes", "no"),
    *("argon2id", "pbkdf2", "uuid:*", "bus:usb id:x", "uuid", ":", "/a", "/", "a/b", "\\", "1\\", "9" * 5000),
)
VALUES = st.one_of(st.sampled_from(SOME), st.text(max_size=12))
PAIRS = st.tuples(st.sampled_from([key for keys in KEYS.values() for key in keys] + ["X", ""]), VALUES).map("=".join)
LINES = st.one_of(
    st.sampled_from([f"[{section}]" for section in (*KEYS, "Other", "")] + ["[", "]", "# x", "; \\", "", " \t"]),
    PAIRS,
    st.text(max_size=20),
)
FILES = st.lists(st.one_of(st.binary(max_size=60), st.lists(LINES, max_size=12).map("\n".join).map(str.encode)))
WHERE = re.compile(r"cannot use the configuration: (file-\d+):(\d+): ")


@given(FILES)
@example([b"[Staged]\nExpire=" + b"1" * 100_000 + b"!"])
@example([b"[Devices]\nAllow=" + b"uuid:x\\\n" * 10_000])
def test_any_text_is_a_configuration_or_an_error_with_file_and_line(files):
    texts = [ConfigText(f"file-{number}", content) for number, content in enumerate(files)]
    try:
        found: Config | ConfigError = parse(texts).config
    except ConfigError as error:
        found = error
    if isinstance(found, Config):
        check(found)
        return
    where = WHERE.match(found.message)
    assert where, found.message
    assert 1 <= int(where[2]) <= files[int(where[1].removeprefix("file-"))].count(b"\n") + 1


def check(config: Config) -> None:
    """What it says can be used."""
    derivation = config.key_derivation
    given = {name: getattr(derivation, name) for name in ("type", "iterations", "memory_kib", "parallel")}
    Pbkdf(**{name: value for name, value in given.items() if value is not None})
    assert all(volume.path.startswith("/") for volume in config.volumes)
    assert len({volume.path for volume in config.volumes}) == len(config.volumes)
    assert config.limits.jobs >= 1
    assert 1 <= config.limits.memory_percent <= 100
    assert config.limits.transaction_seconds >= 1
    config.devices.admit("8a0a1d4e-6a0a-4a57-9d3c-3f9f2d1f0b11", ["/dev/disk/by-id/x"], "usb")


@given(st.lists(PAIRS), st.lists(PAIRS))
def test_a_file_that_ends_is_as_good_as_one_that_goes_on(first, second):
    """Where one file ends and the next begins makes no difference, but for the section."""
    head, tail = "[Limits]\n" + "\n".join(first) + "\n", "[Limits]\n" + "\n".join(second) + "\n"
    assert outcome([head, tail]) == outcome([head + tail])


def outcome(texts: list[str]) -> Config | None:
    """What they say; None if nothing that could be used."""
    try:
        return parse([ConfigText("x", text.encode()) for text in texts]).config
    except ConfigError:
        return None
