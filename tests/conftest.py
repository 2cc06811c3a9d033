# SPDX-License-Identifier: GPL-2.0-or-later
"""What holds for every test: hypothesis profiles, which tests count towards coverage, and the private system."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import tokenplugin
from tests.support.testbed import TestBed

# No deadlines and no verdict on slowness: the machine may be busy.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, database=None, print_blob=True)
settings.register_profile("soak", settings.get_profile("default"), max_examples=5000)
settings.load_profile("default")

#: The tests of the decision code itself.  That a daemon happens to run through a line is no proof of the line.
COUNTED = ("unit", "property", "vectors")


#: Where inventories go, of this process and of all that it starts: not into the machine's own directory.  Set at once,
#: for other modules take the environment when they are imported.
os.environ["STATE_DIRECTORY"] = STATE = tempfile.mkdtemp(prefix="luksrotd-state-")


def pytest_unconfigure() -> None:
    """Leave nothing on the machine."""
    shutil.rmtree(STATE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep coverage off where it does not count: it slows a crash enumeration several times."""
    tests = Path(__file__).parent
    for item in items:
        if item.path.relative_to(tests).parts[0] not in COUNTED:
            item.add_marker("no_cover")


@pytest.fixture(scope="session")
def bed() -> Iterator[TestBed]:
    """The private system (bus, polkit, udev, journal), one for the whole run."""
    with TestBed() as bed:
        yield bed


@pytest.fixture(scope="session")
def token_plugin(bed: TestBed) -> Iterator[None]:
    """libcryptsetup has a token plugin of ours (tests/support/tokenplugin.c), in this process and its children."""
    scratch = bed.dir / "token-plugin"
    scratch.mkdir()
    with tokenplugin.installed(scratch):
        yield
