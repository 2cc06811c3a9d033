# SPDX-License-Identifier: GPL-2.0-or-later
"""Typed calls of libcryptsetup (>= 2.6) on one header: errno in, ``luksrotd.errors`` out.

libcryptsetup has process-wide state (log callback, token handlers) and gives no promise about threads, so only a
single-threaded process may import this module.  Source: libcryptsetup.h; what the errno values mean was measured on
2.6.1.  After any call that failed the context may hold changes that are not on the header: close it.
"""

import errno
import json
from types import TracebackType
from typing import Any, Final, Self

from luksrotd.cryptsetup import tokens
from luksrotd.cryptsetup._ffi import ffi, lib
from luksrotd.cryptsetup.birth import add_with_token
from luksrotd.cryptsetup.calls import begin, check, logged
from luksrotd.cryptsetup.memory import SafeMemory
from luksrotd.cryptsetup.tokens import TokenCredential
from luksrotd.errors import (
    EngineError,
    InvalidRequest,
    LuksrotdError,
    MetadataFull,
    NoFreeArea,
    NoFreeKeyslot,
    WrongCredential,
)
from luksrotd.luks2 import layout
from luksrotd.luks2.areas import Extent, subtract
from luksrotd.rotation.edits import Pbkdf

ANY_KEYSLOT: Final[int] = lib.CRYPT_ANY_SLOT
LUKS2: Final = b"LUKS2"
#: Keyslots that hold the volume key, not some other one.
BOUND: Final[tuple[int, ...]] = (lib.CRYPT_SLOT_ACTIVE, lib.CRYPT_SLOT_ACTIVE_LAST)


class Context:
    """A ``crypt_device`` with the LUKS2 header at ``path`` loaded; a bad copy of a writable header has been repaired.

    Raises ``EngineError`` when there is no LUKS2 header that libcryptsetup accepts.
    """

    def __init__(self, path: str) -> None:
        self._cd: Any = ffi.NULL
        holder = ffi.new("struct crypt_device **")
        tokens.settle_plugins()
        begin()
        check(lib.crypt_init(holder, path.encode()), "open the header")
        self._cd = holder[0]
        try:
            check(lib.crypt_load(self._cd, LUKS2, ffi.NULL), "load the header")
        except EngineError:
            self.close()
            raise

    def close(self) -> None:
        """Release the context and its descriptors; idempotent."""
        cd, self._cd = self._cd, ffi.NULL
        if cd:
            lib.crypt_free(cd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- looking ---------------------------------------------------------------------------------------------------

    def metadata(self) -> dict[str, Any]:
        """The JSON metadata as libcryptsetup has it in memory (crypt_dump_json)."""
        holder = ffi.new("const char **")
        begin()
        check(lib.crypt_dump_json(self._cd, holder, 0), "read the metadata")
        parsed = json.loads(ffi.string(holder[0]))
        if not isinstance(parsed, dict):
            raise EngineError("cannot read the metadata: it is not an object")
        return parsed

    def keyslot_free(self, keyslot: int) -> bool:
        """Whether that number can take a new keyslot (crypt_keyslot_status)."""
        return bool(self._status(keyslot) == lib.CRYPT_SLOT_INACTIVE)

    def keyslot_area(self, keyslot: int) -> Extent:
        """Where the binary area of that keyslot is (crypt_keyslot_area)."""
        offset, length = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        begin()
        check(lib.crypt_keyslot_area(self._cd, keyslot, offset, length), f"find the area of keyslot {keyslot}")
        return Extent(offset[0], length[0])

    def token(self, token: int) -> Any:
        """The JSON of that token."""
        holder = ffi.new("const char **")
        begin()
        check(lib.crypt_token_json_get(self._cd, token, holder), f"read token {token}")
        return json.loads(ffi.string(holder[0]))

    # -- secrets ---------------------------------------------------------------------------------------------------

    def volume_key(
        self, credential: SafeMemory | TokenCredential, keyslot: int = ANY_KEYSLOT
    ) -> tuple[int, SafeMemory]:
        """The keyslot that a passphrase or token opens, and the volume key.  Raises ``WrongCredential``.

        A keyslot that is named can be an unbound one, whose key libcryptsetup would hand out: that is wrong, too.
        A token that cannot be asked is an ``EngineError``.
        """
        if keyslot != ANY_KEYSLOT and self._status(keyslot) not in BOUND:
            raise WrongCredential(f"cannot unlock the volume: no keyslot {keyslot} holds its key")
        key = SafeMemory(max(lib.crypt_get_volume_key_size(self._cd), 1))
        try:
            if isinstance(credential, TokenCredential):
                return tokens.unlock(self._cd, self.metadata(), credential, keyslot, key), key
            return self._try_passphrase(credential, keyslot, key), key
        except LuksrotdError:
            key.close()
            raise

    def _try_passphrase(self, passphrase: SafeMemory, keyslot: int, key: SafeMemory) -> int:
        size = ffi.new("size_t *", key.size)
        begin()
        result = lib.crypt_volume_key_get(self._cd, keyslot, key.address, size, passphrase.address, passphrase.size)
        if result in (-errno.EPERM, -errno.ENOENT):
            raise WrongCredential(_refusal(keyslot))
        return check(result, "unlock the volume key")

    def opens(self, credential: SafeMemory | TokenCredential, keyslot: int) -> bool:
        """Whether a passphrase or token opens the volume by that keyslot."""
        if keyslot < 0:
            raise InvalidRequest(f"cannot try keyslot {keyslot}: out of range")
        if isinstance(credential, TokenCredential):
            return self._token_opens(credential, keyslot)
        return self._passphrase_opens(credential, keyslot)

    def _token_opens(self, credential: TokenCredential, keyslot: int) -> bool:
        try:
            _, key = self.volume_key(credential, keyslot)
        except WrongCredential:
            return False
        key.close()
        return True

    def _passphrase_opens(self, passphrase: SafeMemory, keyslot: int) -> bool:
        """By crypt_activate_by_passphrase without a name."""
        begin()
        result = lib.crypt_activate_by_passphrase(self._cd, ffi.NULL, keyslot, passphrase.address, passphrase.size, 0)
        if result in (-errno.EPERM, -errno.ENOENT):
            return False
        return check(result, f"try keyslot {keyslot}") == keyslot

    def check_volume_key(self, key: SafeMemory) -> None:
        """Raise ``WrongCredential`` unless ``key`` is the volume key (crypt_volume_key_verify)."""
        begin()
        result = lib.crypt_volume_key_verify(self._cd, key.address, key.size)
        if result in (-errno.EPERM, -errno.EINVAL):
            raise WrongCredential("cannot unlock the volume: this is not its volume key")
        check(result, "check the volume key")

    # -- changing --------------------------------------------------------------------------------------------------

    def add_keyslot(
        self, keyslot: int, key: SafeMemory, passphrase: SafeMemory, pbkdf: Pbkdf, token: int | None = None
    ) -> None:
        """Add that keyslot for the volume key; with ``token``, one of ours, assigned to it in the same header write.

        Raises ``NoFreeKeyslot``, ``NoFreeArea``, ``MetadataFull``, and ``InvalidRequest`` when the number is taken.
        """
        self._check_number(keyslot)
        self._set_pbkdf(pbkdf)
        # Asked beforehand: libcryptsetup 2.6.1 says EINVAL for this and for much else.
        if not self._has_room(key.size):
            raise NoFreeArea(f"cannot add keyslot {keyslot}: the keyslots area has no room")
        begin()
        if token is None:
            result = lib.crypt_keyslot_add_by_volume_key(
                self._cd, keyslot, key.address, key.size, passphrase.address, passphrase.size
            )
        else:
            result = add_with_token(self._cd, keyslot, token, key, passphrase)
        if result == -errno.ENOSPC:
            raise MetadataFull(f"cannot add keyslot {keyslot}: the metadata area is full")
        check(result, f"add keyslot {keyslot}")

    def destroy_keyslot(self, keyslot: int) -> None:
        """Overwrite the area of that keyslot and remove it, from the tokens that name it, too."""
        begin()
        check(lib.crypt_keyslot_destroy(self._cd, keyslot), f"destroy keyslot {keyslot}")

    def set_token(self, token: int, body: object) -> None:
        """Write that token, new or not.

        Raises ``MetadataFull``, and ``InvalidRequest`` for what libcryptsetup refuses (no type, no such keyslot, deeper
        than json-c's 32 levels) or would store as something else (json-c clamps integers beyond 64 bits and cuts names
        at a NUL).
        """
        _check_token(token)
        try:
            text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"cannot write token {token}: it is not JSON") from error
        begin()
        result = lib.crypt_token_json_set(self._cd, token, text)
        if result == -errno.ENOSPC:
            raise MetadataFull(f"cannot write token {token}: the metadata area is full")
        if result == -errno.EINVAL:
            raise InvalidRequest(f"cannot write token {token}: libcryptsetup refuses its content{logged()}")
        check(result, f"write token {token}")
        if self.token(token) != body:
            raise InvalidRequest(f"cannot write token {token}: libcryptsetup does not keep its values")

    def remove_token(self, token: int) -> None:
        """Remove that token; it need not exist."""
        _check_token(token)
        begin()
        check(lib.crypt_token_json_set(self._cd, token, ffi.NULL), f"remove token {token}")

    # -- inside ----------------------------------------------------------------------------------------------------

    def _status(self, keyslot: int) -> int:
        return int(lib.crypt_keyslot_status(self._cd, keyslot))

    def _check_number(self, keyslot: int) -> None:
        if self.keyslot_free(keyslot):
            return
        if not any(self.keyslot_free(number) for number in range(layout.KEYSLOTS_MAX)):
            raise NoFreeKeyslot(f"cannot add keyslot {keyslot}: all {layout.KEYSLOTS_MAX} are taken")
        raise InvalidRequest(f"cannot add keyslot {keyslot}: the number is taken or out of range")

    def _has_room(self, key_size: int) -> bool:
        """Whether LUKS2_find_area_gap will find one: first fit among all areas, also those of unknown types."""
        metadata = self.metadata()
        # Both copies come first: twice the JSON area and its binary header.
        start = 2 * (int(metadata["config"]["json_size"]) + layout.BINARY_SIZE)
        space = Extent(start, int(metadata["config"]["keyslots_size"]))
        areas = [keyslot["area"] for keyslot in metadata["keyslots"].values()]
        taken = [Extent(int(area["offset"]), int(area["size"])) for area in areas]
        needed = layout.keyslot_area_size(key_size)
        return any(gap.size >= needed for gap in subtract(space, taken))

    def _set_pbkdf(self, pbkdf: Pbkdf) -> None:
        default = lib.crypt_get_pbkdf_type_params(pbkdf.type.encode())
        if not default:
            raise InvalidRequest(f"cannot use key derivation {pbkdf.type}: libcryptsetup does not know it")
        kind = ffi.new("char[]", pbkdf.type.encode())
        digest = ffi.new("char[]", pbkdf.hash.encode()) if pbkdf.hash is not None else default.hash
        wanted = ffi.new("struct crypt_pbkdf_type *", default[0])
        wanted.type, wanted.hash = kind, digest
        if pbkdf.memory_kib is not None:
            wanted.max_memory_kb = pbkdf.memory_kib
        if pbkdf.parallel is not None:
            wanted.parallel_threads = pbkdf.parallel
        if pbkdf.iterations is not None:
            wanted.iterations, wanted.time_ms = pbkdf.iterations, 0
            wanted.flags |= lib.CRYPT_PBKDF_NO_BENCHMARK
        begin()
        result = lib.crypt_set_pbkdf_type(self._cd, wanted)
        if result == -errno.EINVAL:
            raise InvalidRequest(f"cannot use key derivation {pbkdf.type}: libcryptsetup refuses it{logged()}")
        check(result, "set the key derivation")


def _check_token(token: int) -> None:
    # Negative numbers mean "any" to libcryptsetup, and "any" is the planner's to decide.
    if not 0 <= token < layout.TOKENS_MAX:
        raise InvalidRequest(f"cannot change token {token}: the number is out of range")


def _refusal(keyslot: int) -> str:
    if keyslot == ANY_KEYSLOT:
        return "cannot unlock the volume: the credential opens no keyslot"
    return f"cannot unlock the volume: the credential does not open keyslot {keyslot}"
