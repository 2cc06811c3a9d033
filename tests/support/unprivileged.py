# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a module as an unprivileged user: ``python -m tests.support.unprivileged UID MODULE ARGUMENT…``.

An unprivileged user can often not execute, let alone import from, a Python below somebody's home.  So the module is
imported as root, and its ``main(arguments)`` called as the user.
"""

import importlib
import os
import sys

from tests.support.kernel import die_with_parent


def main() -> None:
    """Import, drop every privilege, run."""
    uid, module, *arguments = sys.argv[1:]
    run = importlib.import_module(module).main
    os.setgroups([])
    os.setresgid(int(uid), int(uid), int(uid))
    os.setresuid(int(uid), int(uid), int(uid))
    die_with_parent()  # changing the user made the kernel forget it
    run(arguments)


if __name__ == "__main__":
    main()
