# SPDX-License-Identifier: GPL-2.0-or-later
"""Every well-known name of luksrotd: bus, object paths, polkit actions, directories, users.

Pure constants. A test holds the files under ``dbus/``, ``polkit/`` and ``systemd/`` against this module.
"""

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
