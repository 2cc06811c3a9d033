# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of all tests."""

from collections.abc import Iterator

import pytest

from tests.support.testbed import TestBed


@pytest.fixture(scope="session")
def bed() -> Iterator[TestBed]:
    """The private system (bus, polkit, udev, journal), one for the whole run."""
    with TestBed() as bed:
        yield bed
