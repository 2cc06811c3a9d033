# SPDX-License-Identifier: GPL-2.0-or-later
"""The example in docs/api.md, as it stands there."""

import re
import subprocess
import sys

import pytest

from luksrotd import transaction
from tests.api.conftest import ROOT
from tests.support.makeimage import KEY, cryptsetup_opens, luks_dump_json, run

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.fixture
def example(tmp_path):
    (script,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    path = tmp_path / "replace-escrow-key"
    path.write_text(script)

    def call(*arguments):
        command = [sys.executable, "-P", str(path), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return call


def test_the_example_does_what_it_says(example, image, key, tmp_path):
    for ticket, keyslot in (("4711", 2), ("4712", 3)):
        new = tmp_path / ticket
        new.write_text(f"the key of ticket {ticket}")
        done = example(image, key, new, ticket)
        assert done.returncode == 0, done.stderr
        assert luks_dump_json(image)["tokens"] == {
            str(keyslot - 2): {"type": "example-escrow", "keyslots": [str(keyslot)], "ticket": ticket}
        }
        assert cryptsetup_opens(image, new.read_bytes(), keyslot)
        assert f"{run('luksUUID', str(image)).strip()}: keyslot {keyslot}, " in done.stdout
    assert done.stdout.splitlines()[:3] == ["add keyslot 3", "remove keyslot 2", "remove token 0"]
    assert not cryptsetup_opens(image, b"the key of ticket 4711")
    assert cryptsetup_opens(image, KEY, 0)


def test_and_says_what_is_wrong(example, image, tmp_path):
    before = image.read_bytes()
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"wrong")
    done = example(image, wrong, wrong, "1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "cannot unlock the volume: the credential opens no keyslot (unchanged)\n"
    assert image.read_bytes() == before


def test_the_page_names_all_that_there_is():
    calls = {name for name in vars(transaction.Transaction) if not name.startswith("_")}
    assert calls == set(re.findall(r"tx\.([a-z_]+)", PAGE))
    errors = set(re.findall(r"`([A-Z][A-Za-z0-9]+)`", PAGE)) - {"Difference", "Committed", "Path"}
    assert all(hasattr(transaction.errors, name) for name in errors), errors
    assert all(hasattr(transaction, name) for name in transaction.__all__)
