# SPDX-License-Identifier: GPL-2.0-or-later
"""The root object, apart from the service behind it."""

import asyncio
import threading

import pytest

from luksrotd.bus import manager
from luksrotd.bus.manager import RESOLVED_AT_ONCE, _Resolver
from luksrotd.errors import UnknownDevice

pytestmark = pytest.mark.asyncio
HANG = 60


async def test_paths_on_dead_file_systems_take_few_threads(monkeypatch):
    alive, begun = threading.Event(), []

    def realpath(path):
        begun.append(path)
        assert alive.wait(HANG)
        return "/dev/x"

    monkeypatch.setattr(manager.os.path, "realpath", realpath)
    resolver = _Resolver()
    with monkeypatch.context() as patched:
        patched.setattr(manager, "RESOLVE_SECONDS", 0.05)
        paths = [str(number) for number in range(RESOLVED_AT_ONCE + 2)]
        results = await asyncio.gather(*map(resolver.resolve, paths), return_exceptions=True)
    assert [type(result) for result in results] == [UnknownDevice] * len(paths)
    assert begun == paths[:RESOLVED_AT_ONCE]
    alive.set()
    assert await resolver.resolve("another") == "/dev/x"


async def test_a_path_without_an_end_leads_nowhere(tmp_path):
    for number in range(2000):
        (tmp_path / str(number)).symlink_to(str(number + 1))
    for path in (str(tmp_path / "0"), "/dev/\0"):
        with pytest.raises(UnknownDevice):
            await _Resolver().resolve(path)
