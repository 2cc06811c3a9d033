# SPDX-License-Identifier: GPL-2.0-or-later
"""Workers find this source tree, whether it is installed or not."""

import os

import pytest


@pytest.fixture(scope="package", autouse=True)
def _source_tree(request):
    path = os.pathsep.join([str(request.config.rootpath), *filter(None, [os.environ.get("PYTHONPATH")])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        yield
