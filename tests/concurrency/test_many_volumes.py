# SPDX-License-Identifier: GPL-2.0-or-later
"""Thirty-two volumes at once, each with a worker of its own."""

import asyncio
import shutil
from contextlib import ExitStack

import pytest

from luksrotd import direct
from luksrotd.host.locks import HostLocks
from luksrotd.luks2.pair import parse_pair
from luksrotd.ports import DeviceRef
from luksrotd.rotation.edits import NEW, UNLOCK
from luksrotd.rotation.view import view
from luksrotd.service.volume import Volumes
from tests.concurrency.driver import CHEAP, secret
from tests.contract.conftest import open_descriptors
from tests.engine.processes import resources
from tests.support.makeimage import KEY, cryptsetup_opens, make_image, set_uuid
from tests.support.simulation import run, secrets

COUNT = 32


@pytest.fixture
def images(tmp_path):
    template = make_image(tmp_path / "template", keyslots_size=1024 * 1024, size=4 * 1024 * 1024)
    images = [tmp_path / f"image{number}" for number in range(COUNT)]
    for number, image in enumerate(images):
        shutil.copy(template, image)
        set_uuid(image, f"00000000-0000-4000-8000-{number:012}")
    return images


def test_all_get_their_own_key(images, tmp_path):
    host = direct.build_host(journal=direct.NoJournal(), locks=HostLocks(runtime=str(tmp_path)))
    volumes = Volumes(host)

    async def everywhere(sources):
        return await asyncio.gather(
            *(
                volumes.enroll(DeviceRef(str(image)), given, data={"of": image.name}, pbkdf=CHEAP)
                for image, given in zip(images, sources, strict=True)
            )
        )

    run(asyncio.sleep(0))
    before = open_descriptors(), resources()[1]
    with ExitStack() as stack:
        sources = [stack.enter_context(secrets(**{UNLOCK: KEY, NEW: secret(each.name, 1)})) for each in images]
        done = run(everywhere(sources))
    assert (open_descriptors(), resources()[1]) == before
    assert len({each.uuid for each in done}) == COUNT
    for image in images:
        seen = view(parse_pair(image.read_bytes()))
        assert [(key.token.data["of"], key.complete) for key in seen.keys] == [(image.name, True)]
        assert cryptsetup_opens(image, secret(image.name, 1), seen.keys[0].keyslot.id)
    assert not cryptsetup_opens(images[0], secret(images[1].name, 1))
