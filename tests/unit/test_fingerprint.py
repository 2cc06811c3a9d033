# SPDX-License-Identifier: GPL-2.0-or-later
import hashlib

import pytest

from luksrotd.errors import FormatError
from luksrotd.rotation.fingerprint import fingerprint

KEYSLOT = {
    "type": "luks2",
    "key_size": 64,
    "area": {"type": "raw", "offset": "32768", "size": "258048", "encryption": "aes-xts-plain64", "key_size": 64},
    "kdf": {"type": "pbkdf2", "hash": "sha512", "iterations": 1000, "salt": "c2FsdC9zYWx0+w=="},
}


def test_is_the_digest_of_the_canonical_salt_and_offset():
    canonical = b'{"offset":"32768","salt":"c2FsdC9zYWx0+w=="}'
    assert fingerprint(KEYSLOT) == "sha256:" + hashlib.sha256(canonical).hexdigest()


def test_changes_with_salt_and_offset_only():
    assert fingerprint({**KEYSLOT, "kdf": {**KEYSLOT["kdf"], "salt": "b3RoZXI="}}) != fingerprint(KEYSLOT)
    assert fingerprint({**KEYSLOT, "area": {**KEYSLOT["area"], "offset": "290816"}}) != fingerprint(KEYSLOT)
    assert fingerprint({**KEYSLOT, "priority": 0, "kdf": {**KEYSLOT["kdf"], "iterations": 9}}) == fingerprint(KEYSLOT)


@pytest.mark.parametrize(
    "keyslot", [{}, {"kdf": {}, "area": {}}, {"kdf": None, "area": {"offset": "0"}}, {**KEYSLOT, "area": 5}]
)
def test_refuses_a_keyslot_without_salt_or_area(keyslot):
    with pytest.raises(FormatError, match=r"^cannot take the fingerprint"):
        fingerprint(keyslot)
