# SPDX-License-Identifier: GPL-2.0-or-later
import os
from pathlib import Path

import pytest

from tests.engine.shadow import shadow_of
from tests.support.makeimage import make_image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _source_tree(monkeypatch):
    """Workers find this source tree, whether it is installed or not."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)


@pytest.fixture
def image(tmp_path):
    return make_image(tmp_path / "image", keyslots_size=1024 * 1024)  # room for four keys, and quick to copy


@pytest.fixture
def shadow(image):
    shadow = shadow_of(image)
    yield shadow
    shadow.close()
