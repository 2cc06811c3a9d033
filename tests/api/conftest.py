# SPDX-License-Identifier: GPL-2.0-or-later
"""``luksrotd.transaction`` as programs use it: real images, real libcryptsetup, judged by the cryptsetup command."""

import os
from pathlib import Path

import pytest

from tests.support.makeimage import KEY, make_image

ROOT = Path(__file__).resolve().parents[2]
FDS = Path("/proc/self/fd")
OTHER = b"the key of keyslot 1"


@pytest.fixture(autouse=True)
def _source_tree(monkeypatch):
    """Workers find this source tree, whether it is installed or not."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)


@pytest.fixture(autouse=True)
def _no_leaked_descriptors():
    before = _descriptors()
    yield
    assert _descriptors() - before == set()


@pytest.fixture
def image(tmp_path):
    """Opened by ``KEY`` (keyslot 0) and ``OTHER`` (keyslot 1); room for two more."""
    return make_image(tmp_path / "image", keyslots_size=1024 * 1024, extra_keys={1: OTHER})


@pytest.fixture
def key(tmp_path):
    """A key file with ``KEY``."""
    path = tmp_path / "key"
    path.write_bytes(KEY)
    return path


def _descriptors():
    """Those of files and memfds: an event loop has some others of its own, and is closed later."""
    targets = {(link.name, str(link.readlink())) for link in FDS.iterdir() if link.is_symlink()}
    return {(fd, target) for fd, target in targets if target.startswith("/") and not target.startswith("/proc/")}
