# SPDX-License-Identifier: GPL-2.0-or-later
"""The one tree of exceptions.

Each leaf has a stable ``code`` (the last part of its D-Bus error name, and the ``"error"`` member of ``--json``)
and each raised error an ``outcome``: what the device holds now, which a caller needs more than the message.
Messages read "cannot …", lower case, without a period, and never contain a secret.  What is on a disk may stand in
them, so they are bounded, one line, and nothing that a terminal obeys.
"""

from enum import StrEnum
from typing import ClassVar, Final


class Outcome(StrEnum):
    """What is true of the device after an operation (design: "tell the caller what happened, in the error too")."""

    UNCHANGED = "unchanged"
    COMMITTED = "committed"
    WIPE_PENDING = "committed-wipe-pending"
    UNKNOWN = "unknown-reconcile-needed"


#: Longest message, in characters.
MESSAGE_MAX: Final = 2000


def plain(text: str) -> str:
    """``text`` as a message may be: at most ``MESSAGE_MAX`` characters, "?" for those that do not print."""
    if len(text) > MESSAGE_MAX:
        text = f"{text[: MESSAGE_MAX - 1]}…"
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class LuksrotdError(Exception):
    """Base of the tree; only leaves (classes with a ``code`` of their own) can be raised."""

    code: ClassVar[str] = ""

    def __init__(self, message: str, *, outcome: Outcome = Outcome.UNCHANGED) -> None:
        if not type(self).__dict__.get("code"):
            raise TypeError(f"{type(self).__name__} is abstract: raise one of its leaves")
        self.message = plain(message)
        super().__init__(self.message)
        self.outcome = outcome


# -- the caller's fault ------------------------------------------------------------------------------------------


class RequestError(LuksrotdError):
    """The request itself is wrong; nothing was looked at yet, or what it names does not exist."""


class InvalidRequest(RequestError):
    """An argument or option is malformed, missing, unknown or contradictory."""

    code = "InvalidArgs"


class UnknownDevice(RequestError):
    """No such device, or it carries no LUKS2 header."""

    code = "UnknownDevice"


class UnknownKey(RequestError):
    """The volume has no managed key of that name."""

    code = "UnknownKey"


class KeyExists(RequestError):
    """The volume already has a managed key of that name."""

    code = "KeyExists"


class WrongCredential(RequestError):
    """The credential opens no keyslot of the volume."""

    code = "WrongCredential"


class SecretRejected(RequestError):
    """A secret cannot be used: empty, too long, unreadable, a directory, endless."""

    code = "SecretRejected"


# -- policy ------------------------------------------------------------------------------------------------------


class RefusedError(LuksrotdError):
    """The volume is in a state in which luksrotd does not write."""


class NotLuks2(RefusedError):
    """LUKS1, or something else."""

    code = "NotLuks2"


class RequirementsPresent(RefusedError):
    """``config.requirements.mandatory`` is not empty (a running re-encryption among them)."""

    code = "RequirementsPresent"


class ForeignSignature(RefusedError):
    """Another signature on the device would stop libcryptsetup from recovering the header."""

    code = "ForeignSignature"


class NoFreeKeyslot(RefusedError):
    """All 32 keyslot or token numbers are taken."""

    code = "NoFreeKeyslot"


class NoFreeArea(RefusedError):
    """The keyslots area has no room for the new key beside what is still referenced."""

    code = "NoFreeArea"


class MetadataFull(RefusedError):
    """The JSON area is too small for the change."""

    code = "MetadataFull"


class BackupMismatch(RefusedError):
    """The header backup is not of this volume, or of this volume before its layout or volume key changed."""

    code = "BackupMismatch"


class LastKeyslot(RefusedError):
    """The change would remove the last way in."""

    code = "LastKeyslot"


class NeedsReconcile(RefusedError):
    """The volume must be reconciled first."""

    code = "NeedsReconcile"


class NeedsPerson(RefusedError):
    """Reconcile found something that it must not decide by itself."""

    code = "NeedsPerson"


# -- contention --------------------------------------------------------------------------------------------------


class BusyError(LuksrotdError):
    """Somebody else is at work on the volume; try again later."""


class Busy(BusyError):
    """The queue is full, or another process holds the volume's job lock."""

    code = "Busy"


class LockTimeout(BusyError):
    """A lock could not be had in time."""

    code = "LockTimeout"


class Conflict(BusyError):
    """Another tool changed the header again and again between the snapshot and the commit."""

    code = "Conflict"


class StaleGeneration(BusyError):
    """The volume's header is not at the sequence number that the caller has seen."""

    code = "StaleGeneration"


class TooMany(BusyError):
    """The caller has as much under way as one user may."""

    code = "LimitsExceeded"


class Cancelled(BusyError):
    """The operation was cancelled before its point of no return."""

    code = "Cancelled"


# -- authorization -----------------------------------------------------------------------------------------------


class AuthorizationError(LuksrotdError):
    """polkit said no, or could not be asked."""


class NotAuthorized(AuthorizationError):
    """Not authorized for the action."""

    code = "NotAuthorized"


class InteractiveAuthorizationRequired(AuthorizationError):
    """An authentication agent could say yes, but the call does not allow interaction."""

    code = "InteractiveAuthorizationRequired"


# -- the disk, the machine, the library --------------------------------------------------------------------------


class FormatError(LuksrotdError):
    """The bytes are not a LUKS2 header that luksrotd understands; says what and where."""

    code = "BadFormat"


class DeviceError(LuksrotdError):
    """The device failed: I/O error, flush error, short write, gone."""

    code = "DeviceFailed"


class LockError(LuksrotdError):
    """A lock directory or file is not what it must be (a symlink, foreign-owned)."""

    code = "LockFailed"


class StateError(LuksrotdError):
    """What luksrotd keeps of a volume outside of it, its inventory, cannot be read or written."""

    code = "StateFailed"


class ConfigError(LuksrotdError):
    """The configuration cannot be used; says in which file and line."""

    code = "ConfigFailed"


class EngineError(LuksrotdError):
    """libcryptsetup, or the worker process that runs it, failed on the shadow."""

    code = "EngineFailed"


class EngineCrashed(EngineError):
    """The worker process died."""

    code = "EngineCrashed"


class EngineTimeout(EngineError):
    """The worker process did not answer in time and was killed."""

    code = "EngineTimeout"


class ConsistencyError(LuksrotdError):
    """A difference that luksrotd cannot explain, or a violated invariant: nothing is written (further)."""

    code = "PlanRejected"


class Unreachable(LuksrotdError):
    """The daemon cannot be reached, or has gone in the middle of an operation; raised by its clients."""

    code = "Unreachable"


class Internal(LuksrotdError):
    """A bug in luksrotd; the journal has the details."""

    code = "Internal"


def leaves() -> dict[str, type[LuksrotdError]]:
    """All classes that can be raised, by ``code``."""
    found: dict[str, type[LuksrotdError]] = {}
    todo: list[type[LuksrotdError]] = [LuksrotdError]
    while todo:
        cls = todo.pop()
        todo.extend(cls.__subclasses__())
        if cls.__dict__.get("code"):
            found[cls.code] = cls
    return found
