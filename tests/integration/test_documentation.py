# SPDX-License-Identifier: GPL-2.0-or-later
"""The command lines and programs of docs/dbus.md do what it says, as they stand there."""

import asyncio
import json
import re
import subprocess

import pytest

from tests.support.daemon_process import BACKUP, ENVIRONMENT, NEW, OLD
from tests.support.testbed import PROJECT

pytestmark = pytest.mark.asyncio

PAGE = (PROJECT / "docs" / "dbus.md").read_text()
THIRD = b"planted-third-secret-7"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def keys(tmp_path):
    for name, secret in (("passphrase", OLD), ("first", BACKUP), ("second", NEW), ("third", THIRD)):
        (tmp_path / name).write_bytes(secret)
        (tmp_path / name).chmod(0o600)
    return tmp_path


async def run(*argv, **variables):
    """Standard output of what must succeed."""
    environment = {**ENVIRONMENT, **{name: str(value) for name, value in variables.items()}}
    done = await asyncio.to_thread(
        subprocess.run,
        [str(word) for word in argv],
        cwd=PROJECT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout.decode()[-3000:], done.stderr.decode()[-3000:])
    return done.stdout.decode()


async def test_every_line_of_busctl(daemon, volume, keys):
    script = "set -eu -o pipefail\n" + "\n".join(blocks("sh"))
    assert script.count("busctl") > 30
    told = await run("bash", "-c", script, device=volume.node, keys=keys)
    lines = told.splitlines()
    assert f'o "{volume.path}"' in told or f'"{volume.path}"' in told
    assert lines.count('s "finished"') == 2  # the jobs that it asks about
    assert lines.count('s "committed"') == 2
    assert "b true" in lines  # VerifyKey
    assert 's "{\\"vault\\": \\"shelf 7\\"}"' in lines  # GetData
    assert int(lines[-1]) == 5  # jobs that the monitor has seen to their end
    (token,) = volume.metadata()["tokens"].values()
    assert (token["generation"], token["state"]) == (2, "active")
    found = [volume.opens(secret) for secret in (OLD, BACKUP, NEW, THIRD)]
    assert found == [True, False, True, False]


async def test_the_programs(daemon, enrolled, keys, tmp_path):
    for number, text in enumerate(blocks("python")):
        (tmp_path / f"{number}.py").write_text(text)
    glib, jeepney = (tmp_path / "0.py", tmp_path / "1.py")
    assert "gi.repository" in glib.read_text()
    told = await run("/usr/bin/python3", glib, enrolled.path, keys / "passphrase")
    assert "'success': True" in told
    assert (enrolled.opens(BACKUP), enrolled.pairs()) == (False, [("backup", 2)])  # a key that only it has seen
    told = await run("/usr/bin/python3", jeepney, enrolled.path, keys / "passphrase", keys / "third")
    assert "(True, 'committed', '', '')" in told
    (example,) = (one for one in enrolled.metadata()["tokens"].values() if one["type"] == "example")
    assert enrolled.opens(THIRD, int(example["keyslots"][0]))


async def test_json_of_busctl_can_be_read(daemon, enrolled):
    """A script that reads properties gets JSON, also of keys and tokens."""
    got = await run(
        "busctl", "--json=short", "get-property", "org.luksrotd1", enrolled.path, "org.luksrotd1.Device", "Keys"
    )
    assert [key["name"]["data"] for key in json.loads(got)["data"]] == ["backup"]
