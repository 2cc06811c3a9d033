# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks of virtual machines."""

from pathlib import Path

import pytest

from tests.installed.vm.volumes import make_volume


@pytest.fixture
def disk(tmp_path):
    """A disk that is a volume, which ``old`` opens, and ``backup``, the managed key."""
    return make_volume(tmp_path / "disk")


def pytest_collection_modifyitems(items):
    """These take as long as an emulated machine takes on a host that may be busy."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(1800))
