# SPDX-License-Identifier: GPL-2.0-or-later
"""Our package, and the same as if it were of another version."""

import re
import subprocess


def version_of(package):
    """Its version."""
    shown = subprocess.run(["dpkg-deb", "--field", package, "Version"], capture_output=True, text=True, check=True)
    return shown.stdout.strip()


def later(package, folder):
    """The package with a higher version, and nothing else changed, in that folder."""
    tree = folder / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = tree / "DEBIAN" / "control"
    control.write_text(re.sub(r"(?m)^(Version: .*)$", r"\1+later", control.read_text()))
    made = folder / "luksrotd_later_amd64.deb"
    subprocess.run(["dpkg-deb", "-Znone", "--root-owner-group", "--build", tree, made], check=True, capture_output=True)
    return made
