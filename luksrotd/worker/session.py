# SPDX-License-Identifier: GPL-2.0-or-later
"""The operations of a worker on its shadow."""

import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, assert_never

from luksrotd.cryptsetup.api import ANY_KEYSLOT, Context
from luksrotd.cryptsetup.memory import SafeMemory
from luksrotd.cryptsetup.tokens import TokenCredential, allow_plugins
from luksrotd.errors import InvalidRequest, SecretRejected
from luksrotd.rotation.edits import (
    UNLOCK,
    VOLUME_KEY,
    AddKeyslot,
    DestroyKeyslot,
    Edit,
    RemoveToken,
    SetToken,
    from_wire,
)
from luksrotd.rotation.fingerprint import fingerprint
from luksrotd.worker import confine
from luksrotd.worker.seal import seal
from luksrotd.worker.secret import generate_into, read_secret


class Session:
    """One shadow, its secrets, and after ``unlock`` its volume key.  After an error only ``close`` is allowed.

    In ``worker.live`` the shadow is the device itself.
    """

    def __init__(self, control: int) -> None:
        self._control = control
        self._path = ""
        self._fds: Sequence[int] = ()
        self._secrets: dict[str, SafeMemory | TokenCredential] = {}
        self._context: Context | None = None
        self._key: SafeMemory | None = None
        self._operations: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
            "load": self._load,
            "unlock": self._unlock,
            "apply": self._apply,
            "opens": self._opens,
        }

    def take(self, fds: Sequence[int]) -> None:
        """What ``start`` is about: the descriptors that came with it, which it tells by their places."""
        self._fds = fds

    def handle(self, request: Mapping[str, Any]) -> Any:
        """The result of one request (``luksrotd.rotation.wire``); raises what ``ports.EngineSession`` says."""
        if not self._path:
            return self._start(request)
        operation = self._operations.get(str(request.get("op")))
        if operation is None:
            raise InvalidRequest("cannot work: unknown operation")
        return operation(request)

    def close(self) -> None:
        """Wipe every secret."""
        if self._context is not None:
            self._context.close()
        for secret in (*self._secrets.values(), self._key):
            if secret is not None:
                secret.close()

    def _start(self, request: Mapping[str, Any]) -> None:
        if request.get("op") != "start":
            raise InvalidRequest("cannot work: the first request must be start")
        shadow = self._fds[request["shadow"]]
        sources = {name: _placed(source, self._fds) for name, source in request["secrets"].items()}
        sources_fds = {fd for source in sources.values() for fd in _fds(source)}
        confine.keep_only({self._control, shadow, *sources_fds})
        confine.limit_writes(self._writable_size(shadow))
        tokens = any("token" in source for source in sources.values())
        if tokens:
            allow_plugins()
        self._seal(tokens=tokens)
        deadline = time.monotonic() + float(request["secret_seconds"])
        for name, source in sources.items():
            self._secrets[name] = _secret(name, source, deadline)
        for fd in sources_fds:
            os.close(fd)
        self._path = f"/proc/self/fd/{shadow}"

    def _seal(self, *, tokens: bool) -> None:
        """The last thing before secrets and header are read."""
        seal(tokens=tokens)

    def _writable_size(self, shadow: int) -> int:
        """Up to where libcryptsetup may write; raises ``InvalidRequest`` for what is not to be worked on."""
        status = os.fstat(shadow)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidRequest("cannot work: the shadow is not a file")
        return status.st_size

    def _load(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._fresh().metadata()

    def _unlock(self, request: Mapping[str, Any]) -> int | None:
        if request["volume_key"]:
            self._key = self._secret(VOLUME_KEY)
            del self._secrets[VOLUME_KEY]
            self._loaded().check_volume_key(self._key)
            return None
        keyslot = ANY_KEYSLOT if request["keyslot"] is None else int(request["keyslot"])
        opened, key = self._loaded().volume_key(self._credential(UNLOCK), keyslot)
        if self._key is not None:
            self._key.close()
        self._key = key
        return opened

    def _apply(self, request: Mapping[str, Any]) -> None:
        for edit in [from_wire(wire) for wire in request["edits"]]:
            self._edit(self._loaded(), edit)

    def _opens(self, request: Mapping[str, Any]) -> bool:
        # A context of its own: the answer must come from what is on the shadow, not from what one believes to be there.
        with Context(self._path) as context:
            return context.opens(self._credential(str(request["secret"])), int(request["keyslot"]))

    def _edit(self, context: Context, edit: Edit) -> None:
        match edit:
            case AddKeyslot(keyslot, secret, pbkdf, token):
                if self._key is None:
                    raise InvalidRequest(f"cannot add keyslot {keyslot}: the volume key is not unlocked")
                context.add_keyslot(keyslot, self._key, self._secret(secret), pbkdf, token)
            case SetToken(token, body, fingerprint_of):
                context.set_token(token, {**body, **_seen(context, token, fingerprint_of)})
            case RemoveToken(token):
                context.remove_token(token)
            case DestroyKeyslot(keyslot):
                context.destroy_keyslot(keyslot)
            case _ as unreachable:  # pragma: no cover - mypy proves it
                assert_never(unreachable)

    def _fresh(self) -> Context:
        if self._context is not None:
            self._context.close()
        self._context = Context(self._path)
        return self._context

    def _loaded(self) -> Context:
        return self._context if self._context is not None else self._fresh()

    def _credential(self, name: str) -> SafeMemory | TokenCredential:
        if name not in self._secrets:
            raise InvalidRequest(f"cannot find a secret named {name!r}")
        return self._secrets[name]

    def _secret(self, name: str) -> SafeMemory:
        secret = self._credential(name)
        if isinstance(secret, TokenCredential):
            raise InvalidRequest(f"cannot use a token as the secret {name!r}: it can only unlock")
        return secret


def _placed(source: Mapping[str, Any], fds: Sequence[int]) -> dict[str, Any]:
    """A declared secret with descriptors in place of their places."""
    placed = {key: fds[value] if key in ("fd", "generate") else value for key, value in source.items()}
    if placed.get("pin") is not None:
        placed["pin"] = _placed(placed["pin"], fds)
    return placed


def _fds(source: Mapping[str, Any]) -> list[int]:
    """The descriptors that a declared secret comes by."""
    if "token" in source:
        return [] if source["pin"] is None else _fds(source["pin"])
    return [int(source["fd"] if "fd" in source else source["generate"])]


def _secret(name: str, source: Mapping[str, Any], deadline: float) -> SafeMemory | TokenCredential:
    if "generate" in source:
        return generate_into(int(source["generate"]))
    if "token" in source:
        pin = None if source["pin"] is None else _read(f"{name} PIN", source["pin"], deadline)
        return TokenCredential(None if source["token"] is None else int(source["token"]), pin)
    return _read(name, source, deadline)


def _read(name: str, source: Mapping[str, Any], deadline: float) -> SafeMemory:
    try:
        return read_secret(int(source["fd"]), int(source["limit"]), deadline)
    except SecretRejected as error:
        raise SecretRejected(f"cannot use the secret {name!r}: {error.message}") from error


def _seen(context: Context, token: int, keyslot: int | None) -> dict[str, str]:
    if keyslot is None:
        return {}
    keyslots = context.metadata()["keyslots"]
    if str(keyslot) not in keyslots:
        raise InvalidRequest(f"cannot write token {token}: there is no keyslot {keyslot}")
    return {"fingerprint": fingerprint(keyslots[str(keyslot)])}
