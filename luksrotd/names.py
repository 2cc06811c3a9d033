# SPDX-License-Identifier: GPL-2.0-or-later
"""Every well-known name of luksrotd: bus, object paths, polkit actions, directories, users.

Pure constants. A test holds the files under ``dbus/``, ``polkit/`` and ``systemd/`` against this module.
"""

from enum import StrEnum
from typing import Final

# D-Bus
BUS_NAME: Final = "org.luksrotd1"
ROOT_PATH: Final = "/org/luksrotd1"
DEVICE_PATH: Final = "/org/luksrotd1/device"
JOB_PATH: Final = "/org/luksrotd1/job"
TRANSACTION_PATH: Final = "/org/luksrotd1/transaction"
MANAGER_INTERFACE: Final = "org.luksrotd1.Manager"
DEVICE_INTERFACE: Final = "org.luksrotd1.Device"
TRANSACTION_INTERFACE: Final = "org.luksrotd1.Transaction"
JOB_INTERFACE: Final = "org.luksrotd1.Job"
INTERFACES: Final = (MANAGER_INTERFACE, DEVICE_INTERFACE, TRANSACTION_INTERFACE, JOB_INTERFACE)
ERROR_PREFIX: Final = "org.luksrotd1.Error."

# polkit: one action per verb
ACTION_LIST: Final = "org.luksrotd1.list"
ACTION_HISTORY: Final = "org.luksrotd1.get-history"
ACTION_CANCEL: Final = "org.luksrotd1.cancel-job"
ACTION_RECONCILE: Final = "org.luksrotd1.reconcile"
ACTION_KEYFILE: Final = "org.luksrotd1.use-keyfile"
ACTION_CREDENTIAL: Final = "org.luksrotd1.use-credential"
ACTION_TOKEN: Final = "org.luksrotd1.use-token"
ACTION_GENERATE: Final = "org.luksrotd1.generate-key"
ACTION_ENROLL: Final = "org.luksrotd1.enroll"
ACTION_ROTATE: Final = "org.luksrotd1.rotate"
ACTION_STAGE: Final = "org.luksrotd1.stage"
ACTION_FINISH: Final = "org.luksrotd1.finish"
ACTION_ABORT: Final = "org.luksrotd1.abort"
ACTION_SET_DATA: Final = "org.luksrotd1.set-data"
ACTION_REMOVE: Final = "org.luksrotd1.remove"
ACTION_ADOPT: Final = "org.luksrotd1.adopt"
ACTION_RELEASE: Final = "org.luksrotd1.release"
ACTION_RECREATE: Final = "org.luksrotd1.recreate"
ACTION_SCRUB: Final = "org.luksrotd1.scrub"
ACTION_TRANSACTION: Final = "org.luksrotd1.transaction"
ACTION_VERIFY: Final = "org.luksrotd1.verify-key"
ACTION_GET_DATA: Final = "org.luksrotd1.get-data"

#: Actions that are about one volume: stricter (``system_action``) for one of the system than for a removable one.
VOLUME_ACTIONS: Final = (
    ACTION_ENROLL,
    ACTION_ROTATE,
    ACTION_STAGE,
    ACTION_FINISH,
    ACTION_ABORT,
    ACTION_SET_DATA,
    ACTION_REMOVE,
    ACTION_ADOPT,
    ACTION_RELEASE,
    ACTION_RECREATE,
    ACTION_SCRUB,
    ACTION_TRANSACTION,
    ACTION_VERIFY,
    ACTION_GET_DATA,
)
_SYSTEM_SUFFIX: Final = "-system"
ACTIONS: Final = (
    ACTION_LIST,
    ACTION_HISTORY,
    ACTION_CANCEL,
    ACTION_RECONCILE,
    ACTION_KEYFILE,
    ACTION_CREDENTIAL,
    ACTION_TOKEN,
    ACTION_GENERATE,
    *VOLUME_ACTIONS,
    *(action + _SYSTEM_SUFFIX for action in VOLUME_ACTIONS),
)


def system_action(action: str) -> str:
    """The action that stands for ``action`` where it is about a volume of the system."""
    return action + _SYSTEM_SUFFIX if action in VOLUME_ACTIONS else action


# Processes and directories
WORKER_USER: Final = "luksrotd-worker"
WORKER_FALLBACK_USER: Final = "nobody"
TPM_DEVICE: Final = "/dev/tpmrm0"
RUNTIME_DIRECTORY: Final = "/run/luksrotd"
STATE_DIRECTORY: Final = "/var/lib/luksrotd"
CONFIG_FILE: Final = "/etc/luksrotd/luksrotd.conf"
CONFIG_DIRECTORIES: Final = (
    "/usr/lib/luksrotd/luksrotd.conf.d",
    "/run/luksrotd/luksrotd.conf.d",
    "/etc/luksrotd/luksrotd.conf.d",
)
CRYPTSETUP_LOCK_DIRECTORY: Final = "/run/cryptsetup"

# Our token (docs/spec/token.md)
TOKEN_TYPE: Final = "luksrotd"
WIPE_TOKEN_TYPE: Final = "luksrotd-wipe"
DEFAULT_KEY_NAME: Final = "backup"

#: Who writes the header: luksrotd, in one commit, or libcryptsetup, in steps.
ATOMIC: Final = "atomic"
STEPWISE: Final = "stepwise"
ENGINES: Final = (ATOMIC, STEPWISE)


class MessageId(StrEnum):
    """MESSAGE_ID of each kind of entry in the journal (systemd/luksrotd.catalog explains them); never to be changed."""

    ENROLLED = "b300a0a30db44bb5ad2104e241153920"
    ROTATED = "778e59600dbe4f8bb3e73b2dcbbae499"
    STAGED = "b55c918df3f04ebebd35ebfe35668449"
    FINISHED = "06725619887e4e6aae2aec097566f559"
    ABORTED = "79f9dc7efa4040929e7c70579b4adc35"
    REMOVED = "125974590a7142a09f062c948ceda079"
    DATA_CHANGED = "9e970f7a7c67486484d62f1850839c7b"
    ADOPTED = "950ae9d3a3fa4ef4818643488b88aadf"
    RELEASED = "2a2bd65110b34bd6b80c4b54b9d5529d"
    RECREATED = "3d8c182c4823473ba38add201eb19744"
    SCRUBBED = "2d88e1901743435bb9296ba957a20170"
    TRANSACTION = "796179b5d3e3445087b0d907dc4906b6"
    BACKED_UP = "784aff2584ad4a21b28f8a5698877689"
    RESTORED = "756f050b18eb4412862d98b01cc4fc1b"
    KEYSLOT_ACCEPTED = "c606d1deb4cc426dbc2379f314579252"
    KEYSLOT_REMOVED = "48f3c28af37f446790c40d7969c0b6a6"
    FAILED = "662f958766eb4e2f9e3bd4595eb77932"
    INTERRUPTED = "4973b5900f1c4996988531d7c1cf1045"
    RECONCILED = "19d93dacfeef46c8a30b5458fa625061"
    NEEDS_PERSON = "158a003deecd4cfa8feb5ac5a2d8691d"
    NOTED = "1ce796151b0b483695761b5ace9d4a1f"
    FOREIGN_CHANGE = "bb50170b16d54d0a8f1f44841feb9758"
    DENIED = "c9604b170d924cfe97a1d787b0e60e6d"
    CONFIGURED = "341b51323231405ea93425d0b1787ba4"
    MISCONFIGURED = "ee2b2c963a124aba98bea82b2e6adfde"
    STARTED = "4c5e8a8bf116457d99d5f6e868cca882"
    STOPPED = "25df6347f26e487381bdc6b71f7a4b2e"
