# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the roots, and the saved machines, that are missing, so that no test has to wait for them.

python -m tests.beds [RELEASE...]
"""

import sys

from tests.beds import roots
from tests.beds.image import image
from tests.beds.initramfs import initramfs
from tests.beds.machine import saved

for release in sys.argv[1:] or roots.RELEASES:
    for made in (roots.installed(release), initramfs(release).folder, saved(release, image(release))):
        print(made)  # noqa: T201 - what the command is for
