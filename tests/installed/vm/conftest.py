# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks of virtual machines."""

import pytest

from tests.installed.vm.volumes import make_volume


@pytest.fixture
def disk(tmp_path):
    """A disk that is a volume, which ``old`` opens, and ``backup``, the managed key."""
    return make_volume(tmp_path / "disk")
