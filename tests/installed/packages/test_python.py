# SPDX-License-Identifier: GPL-2.0-or-later
"""Wheel and sdist: what they hold, and that luksrotctl --direct works out of either, with nothing else of luksrotd."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import BytesParser

import pytest

import luksrotd
from tests.installed.packages.conftest import run
from tests.packaging.places import ROOT, python_files

NAME = f"luksrotd-{luksrotd.__version__}"
#: What setuptools writes into an sdist.
GENERATED = {"PKG-INFO", "setup.cfg"}
#: What is for git alone.
LEFT_OUT = {".gitignore"}


def test_the_sdist_is_the_tree(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.removeprefix(f"{NAME}/") for member in archive if not member.isdir()}
        packed = {
            name: archive.extractfile(f"{NAME}/{name}").read() for name in ("pyproject.toml", "packaging/install")
        }
    names = {name for name in names if not name.startswith("luksrotd.egg-info/")}
    tracked = run("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    there = {name for name in tracked if name and (ROOT / name).is_file()}
    assert names - GENERATED == there - LEFT_OUT
    assert packed == {name: (ROOT / name).read_bytes() for name in packed}


def test_the_wheel_is_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith(f"{NAME}.dist-info/")}
        tags = BytesParser().parsebytes(archive.read(f"{NAME}.dist-info/WHEEL")).get_all("Tag")
    assert names - {"luksrotd/cryptsetup/_ffi.pyi"} == python_files()
    assert len(tags) == 1
    assert tags[0].startswith("cp311-abi3-linux_")


def test_an_index_would_take_the_metadata(wheel, sdist):
    from packaging.metadata import Metadata  # noqa: PLC0415 - not in every virtual environment

    with zipfile.ZipFile(wheel) as archive:
        built = archive.read(f"{NAME}.dist-info/METADATA")
    with tarfile.open(sdist) as archive:
        source = archive.extractfile(f"{NAME}/PKG-INFO").read()
    for raw in (built, source):
        metadata = Metadata.from_email(raw, validate=True)
        assert (metadata.name, str(metadata.version)) == ("luksrotd", luksrotd.__version__)
        assert metadata.description_content_type == "text/markdown"
        assert metadata.description == (ROOT / "README.md").read_text()
    requires = {line for line in built.decode().splitlines() if line.startswith("Requires-Dist")}
    assert requires == {line for line in source.decode().splitlines() if line.startswith("Requires-Dist")}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A new virtual environment that has what luksrotd needs, in the versions that are locked."""
    top = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", top)
    locks = ROOT / "packaging"
    pip(top, "install", "--require-hashes", "--only-binary", ":all:", "-r", locks / "requirements-build.lock")
    pip(top, "install", "--require-hashes", "--no-build-isolation", "-r", locks / "requirements.lock")
    return top


def outside(environment, *argv, folder="/"):
    """Run a command of the environment where nothing of this tree is found; what it prints."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [environment / "bin" / argv[0], *argv[1:]]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pip(environment, *arguments):
    outside(environment, "python", "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments)


def try_out(environment, folder):
    """The README's quick start, on an image file."""
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    format_it = [
        "cryptsetup",
        "luksFormat",
        "--batch-mode",
        "--pbkdf=pbkdf2",
        "--pbkdf-force-iterations=1000",
        image,
        "-",
    ]
    subprocess.run(format_it, input=b"people's own", check=True)
    (folder / "own").write_bytes(b"people's own")

    def direct(*arguments):
        return outside(environment, "luksrotctl", "--direct", *arguments, folder=folder)

    direct("enroll", "disk.img", "-d", "own", "--generate", "--output", "1.key", "--data", '{"at": 1}')
    direct("rotate", "disk.img", "--key-file", "1.key", "--generate", "--output", "2.key", "--data", '{"at": 2}')
    direct("reconcile", "disk.img")
    (key,) = json.loads(direct("show", "disk.img", "--json"))["keys"]
    assert (key["generation"], key["data"]) == (2, {"at": 2})
    opens = ["cryptsetup", "open", "--test-passphrase", "--type=luks2", "--key-file"]
    assert subprocess.run([*opens, folder / "2.key", image], check=False).returncode == 0
    assert subprocess.run([*opens, folder / "1.key", image], check=False, stderr=subprocess.DEVNULL).returncode == 2


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_luksrotctl_works_without_a_daemon(kind, environment, wheel, sdist, tmp_path):
    package = {"wheel": wheel, "sdist": sdist}[kind]
    pip(environment, "install", "--no-index", "--no-build-isolation", "--force-reinstall", "--no-deps", package)
    pip(environment, "check")
    where = outside(environment, "python", "-c", "import luksrotd; print(luksrotd.__file__)")
    assert where.startswith(str(environment))
    assert outside(environment, "luksrotctl", "--version").split()[-1] == luksrotd.__version__
    try_out(environment, tmp_path)
