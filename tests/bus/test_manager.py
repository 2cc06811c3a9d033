# SPDX-License-Identifier: GPL-2.0-or-later
"""The root object, apart from the service behind it."""

import asyncio
import threading

import pytest

from luksrotd.bus import manager
from luksrotd.bus.manager import _resolved
from luksrotd.errors import UnknownDevice
from luksrotd.service.threads import THREADS_ABOUT_ONE

pytestmark = pytest.mark.asyncio
HANG = 60


async def test_paths_on_dead_file_systems_take_few_threads(monkeypatch):
    alive, begun = threading.Event(), []

    def realpath(path):
        begun.append(path)
        assert alive.wait(HANG)
        return "/dev/x"

    monkeypatch.setattr(manager.os.path, "realpath", realpath)
    with monkeypatch.context() as patched:
        patched.setattr(manager, "RESOLVE_SECONDS", 0.05)
        paths = [str(number) for number in range(THREADS_ABOUT_ONE + 2)]
        results = await asyncio.gather(*map(_resolved, paths), return_exceptions=True)
    assert [type(result) for result in results] == [UnknownDevice] * len(paths)
    assert begun == paths[:THREADS_ABOUT_ONE]
    alive.set()
    assert await _resolved("another") == "/dev/x"


async def test_a_path_without_an_end_leads_nowhere(tmp_path):
    for number in range(2000):
        (tmp_path / str(number)).symlink_to(str(number + 1))
    for path in (str(tmp_path / "0"), "/dev/\0"):
        with pytest.raises(UnknownDevice):
            await _resolved(path)
