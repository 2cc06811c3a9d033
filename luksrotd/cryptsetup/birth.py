# SPDX-License-Identifier: GPL-2.0-or-later
"""A keyslot that is born assigned to a token, in one header write (libcryptsetup >= 2.6).

Of all calls of libcryptsetup only crypt_keyslot_add_by_keyslot_context does that, when the new passphrase comes from
a token.  So there is a token handler in this process, which gives libcryptsetup the passphrase when it asks for it.
"""

from typing import Any

from luksrotd.cryptsetup._ffi import ffi, lib
from luksrotd.cryptsetup.memory import SafeMemory
from luksrotd.errors import EngineError
from luksrotd.names import TOKEN_TYPE

#: The secret that the handler hands out; only while a keyslot is being born.
_passphrase: list[SafeMemory] = []
_NAME = ffi.new("char[]", TOKEN_TYPE.encode())
#: libcryptsetup has no way to take a handler back, and takes each name once.
_registered: list[Any] = []


@ffi.def_extern(error=-1)  # type: ignore[untyped-decorator]  # cffi has no types
def luksrotd_token_open(cd: Any, token: int, buffer: Any, length: Any, user: Any) -> int:
    """Hand out a copy of the new passphrase (crypt_token_open_func)."""
    if not _passphrase:
        return -1
    copy = lib.crypt_safe_alloc(_passphrase[0].size)
    if not copy:
        return -1
    ffi.memmove(copy, _passphrase[0].address, _passphrase[0].size)
    buffer[0] = ffi.cast("char *", copy)
    length[0] = _passphrase[0].size
    return 0


@ffi.def_extern()  # type: ignore[untyped-decorator]  # cffi has no types
def luksrotd_token_free(buffer: Any, length: int) -> None:
    """Wipe and free that copy (crypt_token_buffer_free_func)."""
    lib.crypt_safe_free(buffer)


def add_with_token(cd: Any, keyslot: int, token: int, key: SafeMemory, passphrase: SafeMemory) -> int:
    """Add ``keyslot`` for the volume key ``key``, opened by ``passphrase``, and named by ``token``, which is ours.

    What libcryptsetup returns: a negative errno value, or the number of the keyslot.
    """
    _register()
    holders = [ffi.new("struct crypt_keyslot_context **") for _ in range(2)]
    existing, added = holders
    _passphrase.append(passphrase)
    try:
        result = lib.crypt_keyslot_context_init_by_volume_key(cd, key.address, key.size, existing)
        if result == 0:
            result = lib.crypt_keyslot_context_init_by_token(cd, token, ffi.NULL, ffi.NULL, 0, ffi.NULL, added)
        if result == 0:
            result = lib.crypt_keyslot_add_by_keyslot_context(cd, lib.CRYPT_ANY_SLOT, existing[0], keyslot, added[0], 0)
        return int(result)
    finally:
        _passphrase.clear()
        for holder in holders:
            lib.crypt_keyslot_context_free(holder[0])


def _register() -> None:
    if _registered:
        return
    handler = ffi.new("crypt_token_handler *")
    handler.name, handler.open, handler.buffer_free = _NAME, lib.luksrotd_token_open, lib.luksrotd_token_free
    if lib.crypt_token_register(handler) != 0:
        raise EngineError(f"cannot add a keyslot with a token: libcryptsetup takes no handler for {TOKEN_TYPE}")
    _registered.append(handler)
