# SPDX-License-Identifier: GPL-2.0-or-later
"""The packages that ``make packages`` has built."""

import subprocess
from pathlib import Path

import pytest

from tests.packaging.places import ROOT


def run(*argv: str | Path) -> str:
    """What the command says; its complaints, if it fails, are shown by pytest."""
    return subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, stdin=subprocess.DEVNULL).stdout


def only(pattern: str) -> Path:
    """The one file that ``pattern`` matches below the tree."""
    found = sorted(ROOT.glob(pattern))
    assert len(found) == 1, f"{pattern}: {found}; make packages builds what is missing"
    return found[0]


@pytest.fixture(scope="session")
def deb() -> Path:
    """Debian's package."""
    return only("build/deb/luksrotd_*.deb")


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The wheel."""
    return only("dist/*.whl")


@pytest.fixture(scope="session")
def sdist() -> Path:
    """The sdist."""
    return only("dist/*.tar.gz")
