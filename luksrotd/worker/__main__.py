# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -P -m luksrotd.worker CONTROL-FD PARENT-PID [GROUP…]``: one operation on one shadow, then it is thrown away.

Started by ``luksrotd.host.launch`` with nothing open but the standard descriptors (null, null, a file for stderr) and a
stream socket; the shadow and the secrets come with the first request.  Everything is imported before the privileges go,
as the code may lie where only root can read.
"""

import os
import sys
from functools import partial

from luksrotd.worker.confine import confine
from luksrotd.worker.serve import serve
from luksrotd.worker.session import Session

if __name__ == "__main__":
    # No interpreter shutdown: nothing is left to flush, and no destructor should run on half-freed C objects.
    groups = [int(group) for group in sys.argv[3:]]
    os._exit(serve(int(sys.argv[1]), int(sys.argv[2]), Session, partial(confine, groups=groups)))
