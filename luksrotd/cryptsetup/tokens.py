# SPDX-License-Identifier: GPL-2.0-or-later
"""Volume keys by LUKS2 tokens (libcryptsetup >= 2.6): the plugin of the token's type is asked for the passphrase.

The type is a name that the header chooses, and libcryptsetup would dlopen libcryptsetup-token-TYPE.so wherever it meets
a token.  So no process loads a plugin but one that called ``allow_plugins`` before its first ``Context``.
"""

import errno
from collections.abc import Mapping
from typing import Any, Final

from luksrotd.cryptsetup._ffi import ffi, lib
from luksrotd.cryptsetup.calls import begin, logged
from luksrotd.cryptsetup.memory import SafeMemory
from luksrotd.errors import EngineError, LuksrotdError, WrongCredential
from luksrotd.names import TOKEN_TYPE, WIPE_TOKEN_TYPE
from luksrotd.records import dataclass

#: Ours hold no passphrase.
_OURS: Final = frozenset({TOKEN_TYPE, WIPE_TOKEN_TYPE})
#: Need USB devices and somebody who touches them; the worker has neither.
_INTERACTIVE: Final = frozenset({"systemd-fido2", "systemd-pkcs11"})
#: Tokens that a PIN is tried on, where any may be asked: a header with thirty of them must not lock the TPM up, which
#: counts wrong ones.
PIN_TRIES: Final = 3
#: Longest name of a type in a message, in characters.
_SHOWN: Final = 64


@dataclass(frozen=True, slots=True)
class TokenCredential:
    """A token by its number, or (None) any that does; its PIN."""

    token: int | None
    pin: SafeMemory | None = None

    def close(self) -> None:
        """Wipe the PIN; idempotent."""
        if self.pin is not None:
            self.pin.close()


class _Plugins:
    """Whether this process may load any.  libcryptsetup knows no way back from disabling them."""

    allowed = False


def allow_plugins() -> None:
    """From now on tokens may be asked; only before the first ``Context``."""
    _Plugins.allowed = True


def settle_plugins() -> None:
    """Before libcryptsetup sees any header."""
    if not _Plugins.allowed:
        lib.crypt_token_external_disable()


def candidates(metadata: Mapping[str, Any], token: int | None, keyslot: int | None) -> list[tuple[int, str]]:
    """Number and type of the tokens to ask, at least one; with ``keyslot`` those that name it.

    Raises ``WrongCredential`` if there is none, and ``EngineError`` if there are only such as cannot be asked.
    """
    found = {int(number): body for number, body in metadata["tokens"].items() if token in (None, int(number))}
    found = {number: body for number, body in found.items() if body["type"] not in _OURS}
    if keyslot is not None:
        found = {number: body for number, body in found.items() if str(keyslot) in body["keyslots"]}
    usable = [(number, str(body["type"])) for number, body in sorted(found.items()) if body["type"] not in _INTERACTIVE]
    if found and not usable and keyslot is None:
        number = min(found)
        kind = found[number]["type"]
        raise EngineError(f"cannot use token {number}: type {kind} is not supported, as it needs somebody at a device")
    if not usable:
        which = "token" if token is None else f"token {token}"
        opening = "unlock the volume" if keyslot is None else f"open keyslot {keyslot}"
        raise WrongCredential(f"cannot {opening}: it has no {which} that could")
    return usable


def unlock(cd: Any, metadata: Mapping[str, Any], credential: TokenCredential, keyslot: int, key: SafeMemory) -> int:
    """Get the volume key into ``key``, by ``keyslot`` or (CRYPT_ANY_SLOT) any; the keyslot that it was.

    ``metadata``: as libcryptsetup has it.  Raises ``WrongCredential`` and ``EngineError``.
    """
    wanted = None if keyslot == lib.CRYPT_ANY_SLOT else keyslot
    failures: list[LuksrotdError] = []
    tries = 0
    for token, kind in candidates(metadata, credential.token, wanted):
        begin()
        result = volume_key(cd, token, None, key)
        with_pin = result == -errno.ENOANO and credential.pin is not None and tries < PIN_TRIES
        if with_pin:
            tries += 1
            # Only to one that asks for it: to a TPM, a PIN that is not wanted is a wrong one, and those are counted.
            result = volume_key(cd, token, credential.pin, key)
        if result >= 0 and wanted in (None, result):
            return result
        failures.append(failure(token, kind, result, with_pin=with_pin))
    # A wrong PIN says more than a TPM that some other token would have needed.
    raise next((error for error in failures if isinstance(error, WrongCredential)), failures[0])


def volume_key(cd: Any, token: int, pin: SafeMemory | None, key: SafeMemory) -> int:
    """Get the volume key into ``key`` by that token.

    What libcryptsetup returns: a negative errno value, or the number of the keyslot.
    """
    holder = ffi.new("struct crypt_keyslot_context **")
    size = ffi.new("size_t *", key.size)
    address, length = (pin.address, pin.size) if pin is not None else (ffi.NULL, 0)
    # The context keeps the address of the PIN, which outlives it.
    result = lib.crypt_keyslot_context_init_by_token(cd, token, ffi.NULL, address, length, ffi.NULL, holder)
    try:
        if result == 0:
            result = lib.crypt_volume_key_get_by_keyslot_context(cd, lib.CRYPT_ANY_SLOT, key.address, size, holder[0])
        return int(result)
    finally:
        lib.crypt_keyslot_context_free(holder[0])


def failure(token: int, kind: str, result: int, *, with_pin: bool) -> LuksrotdError:
    """The error for what ``volume_key`` returned for a token of that type.

    libcryptsetup.h (crypt_activate_by_token_pin) says what the errno values mean.
    """
    what = f"cannot unlock the volume by token {token} ({kind[:_SHOWN]})"
    match -result:
        case errno.ENOANO:
            return WrongCredential(f"{what}: it needs a PIN, and this is not it{logged()}")
        case errno.ENOENT:
            return EngineError(f"{what}: no plugin gives anything, or no keyslot of the volume is named{logged()}")
        case errno.EAGAIN:
            return EngineError(f"{what}: the device that it needs is not there{logged()}")
        case errno.EPERM:
            return WrongCredential(f"{what}: what it gives opens no keyslot{logged()}")
        case number if number > 0 and with_pin:
            # systemd 252 says ENOTRECOVERABLE for a wrong PIN, and for all else that is wrong with a TPM.
            name = errno.errorcode.get(number, number)
            return WrongCredential(f"{what}: the PIN is wrong, or the device fails: {name}{logged()}")
        case number if number > 0:
            return EngineError(f"{what}: {errno.errorcode.get(number, number)}{logged()}")
    return WrongCredential(f"{what}: it opens keyslot {result}")
