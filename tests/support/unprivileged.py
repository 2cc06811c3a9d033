# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a module as an unprivileged user: ``python -m tests.support.unprivileged UID MODULE ARGUMENT…``.

An unprivileged user can often not execute, let alone import from, a Python below somebody's home.  So the module is
imported as root, and its ``main(arguments)`` called as the user, in the groups that a login gives: polkit's rules see
the groups of the process on Debian 13, those of the user on Debian 12.
"""

import importlib
import os
import pwd
import sys

from tests.support.kernel import die_with_parent


def main() -> None:
    """Import, drop every privilege, run."""
    uid, module, *arguments = sys.argv[1:]
    run = importlib.import_module(module).main
    user = pwd.getpwuid(int(uid))
    os.initgroups(user.pw_name, user.pw_gid)
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    die_with_parent()  # changing the user made the kernel forget it
    run(arguments)


if __name__ == "__main__":
    main()
