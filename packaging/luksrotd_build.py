# SPDX-License-Identifier: GPL-2.0-or-later
"""The build backend (PEP 517 and 660): setuptools, told of the cffi extension and of what an sdist holds.

``cffi_modules`` and a command of one's own can only be given to ``setup()``, and there is no setup.py: setuptools then
calls ``setup()`` itself, without arguments, so they are bound here.  Each hook runs in a process of its own, which sees
nothing else of this.  (``[tool.setuptools.ext-modules]`` would need setuptools 74; Debian 12 has 66.)
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import setuptools
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.sdist import sdist

__all__ = (
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
)

#: The stable ABI of the oldest Python that luksrotd runs on: one wheel for every later one.
ABI = "cp311"

#: Beside the package itself, what a distribution needs to build, test and install luksrotd.
SDIST = (".ci", "CHANGELOG.md", "Makefile", "dbus", "docs", "packaging", "polkit", "systemd", "tests")


class SourceDistribution(sdist):
    """The sdist command, without a MANIFEST.in."""

    def make_distribution(self) -> None:
        """Add the files that setuptools does not know of, then do as ever."""
        self.filelist.extend(map(str, _beside_the_package()))
        super().make_distribution()


def _beside_the_package() -> Iterator[Path]:
    for top in map(Path, SDIST):
        for path in [top, *sorted(top.rglob("*"))]:
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


setuptools.setup = partial(
    setuptools.setup,
    cffi_modules=["luksrotd/cryptsetup/ffi_build.py:ffibuilder"],
    cmdclass={"sdist": SourceDistribution},
    options={"bdist_wheel": {"py_limited_api": ABI}},
)
