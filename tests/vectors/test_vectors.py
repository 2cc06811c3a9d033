# SPDX-License-Identifier: GPL-2.0-or-later
"""Every vector against our parser, and against what ``cryptsetup luksDump`` says of the same bytes."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from luksrotd.errors import LuksrotdError
from luksrotd.luks2.pair import Pair, read_pair
from tests.support import forge
from tests.vectors import catalogue, catalogue_json  # noqa: F401 - the second registers its vectors
from tests.vectors.catalogue import DEVICE_SIZE, VECTORS, Image, Vector

NAMES = [vector.name for vector in VECTORS]


@dataclass(frozen=True)
class Dump:
    """What cryptsetup says of the copy that it uses."""

    metadata: bytes
    seqid: int


def run(*command: str | Path, stdin: bytes = b"") -> bytes | None:
    # C locale: warnings are not compared, but then they can be read.
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, input=stdin, capture_output=True, check=False, env=environment)
    assert done.returncode >= 0, f"{command[0]} died of signal {-done.returncode}"
    return done.stdout if done.returncode == 0 else None


@pytest.fixture(scope="session")
def head(tmp_path_factory) -> bytes:
    """Both header copies of a volume made by cryptsetup."""
    path = tmp_path_factory.mktemp("volume") / "volume"
    path.touch()
    os.truncate(path, DEVICE_SIZE)
    cost = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    assert run("cryptsetup", "luksFormat", "-q", "--type", "luks2", *cost, path, "-", stdin=b"pw") is not None
    with path.open("rb") as volume:
        return volume.read(2 * 16384)


def dumped(image: Image, path: Path) -> Dump | None:
    """Ask cryptsetup, which rewrites the copy that it does not use: so the sequence number can be read from it."""
    path.write_bytes(image.head[: image.size])
    os.truncate(path, image.size)
    try:
        text = run("cryptsetup", "luksDump", "--dump-json-metadata", path)
        if text is None:
            return None
        return Dump(text, forge.fields_of(path.read_bytes()[:4096], forge.Which.PRIMARY)["seqid"])
    finally:
        path.unlink()


@pytest.fixture(scope="session")
def verdicts(head, tmp_path_factory) -> dict[str, Dump | None]:
    """What cryptsetup says of every vector."""
    folder = tmp_path_factory.mktemp("vectors")
    with ThreadPoolExecutor(4) as pool:
        asked = {
            vector.name: pool.submit(lambda each: dumped(each.build(head), folder / each.name), vector)
            for vector in VECTORS
        }
        return {name: answer.result() for name, answer in asked.items()}


def parsed(image: Image) -> Pair | LuksrotdError:
    try:
        return read_pair(image.read, image.size)
    except LuksrotdError as error:
        return error


def test_names_are_unique():
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("vector", VECTORS, ids=NAMES)
def test_our_verdict(vector: Vector, head: bytes):
    found = parsed(vector.build(head))
    if isinstance(found, LuksrotdError):
        kind, _, fragment = vector.expect.partition(": ")
        assert (type(found).__name__, fragment in found.message) == (kind, True), found.message
        assert len(found.message) < 1000
    else:
        doubt = ", in doubt" if found.doubt else ""
        assert f"{found.winner.header.which}{doubt}" == vector.expect


@pytest.mark.parametrize("vector", VECTORS, ids=NAMES)
def test_libcryptsetup_agrees_or_is_laxer_where_we_say_so(
    vector: Vector, head: bytes, verdicts: dict[str, Dump | None]
):
    ours, theirs = parsed(vector.build(head)), verdicts[vector.name]
    if isinstance(ours, LuksrotdError):
        assert (theirs is not None) == bool(vector.stricter), "deliberately stricter, or not?"
    else:
        assert theirs is not None, "we accept what libcryptsetup refuses"
        same = (theirs.seqid, json.loads(theirs.metadata)) == (ours.winner.header.seqid, ours.winner.metadata.raw)
        assert same != bool(vector.stricter)
        assert same or ours.doubt, "another winner than libcryptsetup's, and no doubt about it"
