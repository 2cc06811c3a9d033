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
MANAGER_INTERFACE: Final = "org.luksrotd1.Manager"
DEVICE_INTERFACE: Final = "org.luksrotd1.Device"
JOB_INTERFACE: Final = "org.luksrotd1.Job"
ERROR_PREFIX: Final = "org.luksrotd1.Error."

# polkit: one action per verb
ACTION_LIST: Final = "org.luksrotd1.list"
ACTION_ENROLL: Final = "org.luksrotd1.enroll"
ACTION_ROTATE: Final = "org.luksrotd1.rotate"
ACTION_VERIFY: Final = "org.luksrotd1.verify-key"
ACTION_GET_DATA: Final = "org.luksrotd1.get-data"
ACTION_RECONCILE: Final = "org.luksrotd1.reconcile"
ACTION_CANCEL: Final = "org.luksrotd1.cancel-job"
ACTION_KEYFILE: Final = "org.luksrotd1.use-keyfile"
ACTIONS: Final = (
    ACTION_LIST,
    ACTION_ENROLL,
    ACTION_ROTATE,
    ACTION_VERIFY,
    ACTION_GET_DATA,
    ACTION_RECONCILE,
    ACTION_CANCEL,
    ACTION_KEYFILE,
)

# Processes and directories
WORKER_USER: Final = "luksrotd-worker"
WORKER_FALLBACK_USER: Final = "nobody"
RUNTIME_DIRECTORY: Final = "/run/luksrotd"
STATE_DIRECTORY: Final = "/var/lib/luksrotd"
CRYPTSETUP_LOCK_DIRECTORY: Final = "/run/cryptsetup"

# Our token (docs/spec/token.md)
TOKEN_TYPE: Final = "luksrotd"
WIPE_TOKEN_TYPE: Final = "luksrotd-wipe"
DEFAULT_KEY_NAME: Final = "backup"

#: Who writes the header: luksrotd, in one commit, or libcryptsetup, in steps.
ATOMIC: Final = "atomic"
STEPWISE: Final = "stepwise"
ENGINES: Final = (ATOMIC, STEPWISE)
