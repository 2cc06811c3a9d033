# SPDX-License-Identifier: GPL-2.0-or-later
"""A copy with a right checksum whose JSON only libcryptsetup could accept: it is asked before anything is done."""

import pytest

from luksrotd.errors import NeedsPerson, NeedsReconcile
from luksrotd.luks2.layout import Which
from luksrotd.rotation.reconcile import Code
from tests.support import forge
from tests.support.simengine import SimSession, make_volume
from tests.support.simulation import MAIN, NEW, OLD, Simulation, run


@pytest.fixture
def doubtful():
    """An enrolled volume whose newer primary has JSON that we refuse."""
    enrolled = Simulation(make_volume([MAIN]))
    enrolled.enroll(MAIN, OLD, ref=1)
    image = forge.newer(enrolled.disk.content, [Which.PRIMARY])
    return Simulation(forge.with_text(image, b'{"keyslots":', [Which.PRIMARY]))


def test_it_is_healed_where_libcryptsetup_refuses_it_too(doubtful):
    with pytest.raises(NeedsReconcile):
        run(doubtful.volumes.data(doubtful.ref))
    done = doubtful.reconcile()
    assert [finding.code for finding in done.repaired] == [Code.HEADER_COPY_BAD]
    assert done.left == ()
    assert doubtful.pair.agree
    assert run(doubtful.volumes.data(doubtful.ref)) == {"ref": 1}
    assert doubtful.rotate(MAIN, NEW).generation == 2


def test_it_is_left_to_a_person_where_libcryptsetup_accepts_it(doubtful, monkeypatch):
    before = doubtful.disk.content

    async def load(self):
        return {"keyslots": {}}

    monkeypatch.setattr(SimSession, "load", load)
    for change in (doubtful.reconcile, lambda: doubtful.rotate(MAIN, NEW)):
        with pytest.raises(NeedsPerson, match="libcryptsetup accepts a copy that we refuse"):
            change()
    assert doubtful.disk.content == before
