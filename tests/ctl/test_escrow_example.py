# SPDX-License-Identifier: GPL-2.0-or-later
"""The example of an escrow: what it has encrypted opens the volume, for who has the private key."""

import shutil
import subprocess

import pytest

from tests.ctl.conftest import BACKUP, ROOT, fails, our_tokens, works
from tests.support.makeimage import KEY, cryptsetup_opens, run

EXAMPLE = ROOT / "packaging" / "examples" / "escrow.example"


def openssl(*arguments):
    return subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True).stdout


@pytest.fixture
def escrow(tmp_path):
    """The program, and the environment in which the unit would run it."""
    program, state = tmp_path / "escrow", tmp_path / "state"
    shutil.copy(EXAMPLE, program)
    state.mkdir(mode=0o700)
    new = ("-nodes", "-newkey", "rsa:2048", "-subj", "/CN=escrow")
    openssl("req", "-x509", *new, "-keyout", tmp_path / "escrow.key", "-out", tmp_path / "escrow.pem")
    return program, {"STATE_DIRECTORY": str(state), "ESCROW_CERTIFICATE": str(tmp_path / "escrow.pem")}


def test_the_key_can_be_had_again(enrolled, secret, escrow, tmp_path):
    program, env = escrow
    words = ("--direct", "rotate", enrolled, "-d", secret(KEY), "--generate", "--escrow", program)
    works(*words, env=env)
    name = f"{run('luksUUID', str(enrolled)).strip()}-backup-2.cms"
    assert our_tokens(enrolled)[0]["data"] == {"escrow": name}
    kept = tmp_path / "state" / name
    decrypt = ("-decrypt", "-binary", "-inform", "DER", "-inkey", tmp_path / "escrow.key")
    assert cryptsetup_opens(enrolled, openssl("cms", *decrypt, "-in", kept))
    assert not cryptsetup_opens(enrolled, BACKUP)
    assert [path.name for path in kept.parent.iterdir()] == [name]
    assert kept.stat().st_mode & 0o777 == 0o600


def test_a_key_that_is_there_is_not_written_over(enrolled, secret, escrow, tmp_path):
    program, env = escrow
    words = ("--direct", "rotate", enrolled, "--generate", "--escrow", program)
    fails(1, *words, "-d", secret(b"wrong"), env=env)
    [first] = (tmp_path / "state").iterdir()
    before = first.read_bytes()
    works(*words, "-d", secret(KEY), env=env)
    assert first.read_bytes() == before
    assert len(list(first.parent.iterdir())) == 2
    assert our_tokens(enrolled)[0]["data"]["escrow"] != first.name


def test_without_a_certificate_nothing_is_changed(enrolled, secret, escrow):
    program, env = escrow
    before = enrolled.read_bytes()
    words = ("--direct", "rotate", enrolled, "-d", secret(KEY), "--generate", "--escrow", program)
    fails(1, *words, env={**env, "ESCROW_CERTIFICATE": "/nowhere"})
    assert enrolled.read_bytes() == before
