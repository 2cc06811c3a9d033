# SPDX-License-Identifier: GPL-2.0-or-later
"""LUKS2 images by the cryptsetup command, fast: one format per set of parameters and test session, then copies."""

import atexit
import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: With room for data: cryptsetup warns about an image that ends where the data would begin.
IMAGE_SIZE = 17 * 1024 * 1024
DATA_SIZE = 1024 * 1024
KEY = b"the key of keyslot 0"
PBKDF = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")

_templates: dict[tuple[object, ...], Path] = {}


def make_image(  # noqa: PLR0913 - all but the path are keywords, each an option of cryptsetup
    path: str | Path,
    *,
    key: bytes = KEY,
    metadata_size: int | None = None,
    keyslots_size: int | None = None,
    sector_size: int | None = None,
    key_size: int = 512,
    iterations: int = 1000,
    extra_keys: Mapping[int, bytes] | None = None,
    detached: bool = False,
    size: int | None = None,
) -> Path:
    """A LUKS2 volume with a UUID of its own (but the template's volume key) in the file ``path``, which is returned.

    ``key`` opens keyslot 0 and ``extra_keys`` the keyslots with their numbers; sizes are in bytes,
    ``key_size`` is in bits.  A detached header has the file ``path`` to itself; its data is in ``path`` with
    ``.data`` appended.
    """
    path = Path(path)
    extra = dict(extra_keys or {})
    sizes = (metadata_size, keyslots_size, sector_size, key_size, iterations, size)
    parameters = (key, *sizes, tuple(sorted(extra.items())), detached)
    template = _templates.get(parameters)
    if template is None:
        template = _templates[parameters] = _directory() / str(len(_templates))
        _format(template, key, sizes, extra, detached)
    _copy(template, path)
    if detached:
        _sparse(path.with_name(path.name + ".data"), DATA_SIZE)
    set_uuid(path, str(uuid.uuid4()))
    return path


def set_uuid(path: Path, value: str) -> None:
    """Write ``value`` into both header copies and mend their checksums."""
    with path.open("r+b") as image:
        size = struct.unpack_from(">Q", image.read(16), 8)[0]
        for offset in (0, size):
            image.seek(offset)
            header = bytearray(image.read(size))
            header[168:208] = value.encode().ljust(40, b"\0")
            header[448:512] = bytes(64)
            header[448:480] = hashlib.sha256(header).digest()
            image.seek(offset)
            image.write(header[:4096])


def add_key(path: str | Path, key: bytes, new: bytes, *options: str, iterations: int = 1000) -> None:
    """``cryptsetup luksAddKey`` with further ``options``."""
    with tempfile.NamedTemporaryFile() as old, tempfile.NamedTemporaryFile() as added:
        for file, secret in ((old, key), (added, new)):
            file.write(secret)
            file.flush()
        kdf = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", str(iterations))
        run("luksAddKey", "--key-file", old.name, *kdf, *options, str(path), added.name)


def import_token(path: str | Path, token: Mapping[str, Any], number: int) -> None:
    """``cryptsetup token import``; no plugin validates it."""
    run(
        "token",
        "import",
        "--disable-external-tokens",
        "--token-id",
        str(number),
        str(path),
        stdin=json.dumps(token).encode(),
    )


def cryptsetup_opens(path: str | Path, key: bytes, keyslot: int | None = None) -> bool:
    """Whether ``cryptsetup open --test-passphrase`` accepts ``key``; a keyslot that does not exist is a no."""
    slot = () if keyslot is None else ("--key-slot", str(keyslot))
    command = ["cryptsetup", "open", "--test-passphrase", "--key-file", "-", *slot, str(path)]
    done = subprocess.run(command, input=key, capture_output=True, check=False)
    if done.returncode in (1, 2) and (b"No key available" in done.stderr or b"No usable keyslot" in done.stderr):
        return False
    assert done.returncode == 0, done.stderr.decode()
    return True


def luks_dump_json(path: str | Path) -> dict[str, Any]:
    """``cryptsetup luksDump --dump-json-metadata``."""
    return json.loads(run("luksDump", "--dump-json-metadata", str(path)))  # type: ignore[no-any-return]  # an object


def run(*arguments: str, stdin: bytes = b"") -> str:
    """Run cryptsetup, which must succeed; its output."""
    command = ["cryptsetup", "--batch-mode", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr.decode()}"
    return done.stdout.decode()


def _format(path: Path, key: bytes, sizes: tuple[int | None, ...], extra: Mapping[int, bytes], detached: bool) -> None:
    metadata_size, keyslots_size, sector_size, key_size, iterations, size = sizes
    named = {"luks2-metadata-size": metadata_size, "luks2-keyslots-size": keyslots_size, "sector-size": sector_size}
    options = [f"--{name}={value}" for name, value in named.items() if value is not None]
    kdf = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", str(iterations), "--key-size", str(key_size)]
    data = path.with_name(path.name + ".data")
    if detached:
        _sparse(data, DATA_SIZE)
        options += ["--header", str(path)]
    else:
        keyslots_end = 2 * (metadata_size or 16384) + (keyslots_size or 0)
        _sparse(path, size or max(IMAGE_SIZE, keyslots_end + DATA_SIZE))
    target = data if detached else path
    run("luksFormat", "--type", "luks2", *kdf, *options, "--key-file", "-", str(target), stdin=key)
    for number, secret in extra.items():
        add_key(path, key, secret, "--key-slot", str(number), iterations=iterations or 1000)


def _copy(source: Path, target: Path) -> None:
    """Without the holes, which are most of an image."""
    with source.open("rb") as old, target.open("wb") as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        end = 0
        while end < size:
            try:
                start = os.lseek(old.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data any more
                    return
                raise
            end = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            assert os.pwrite(new.fileno(), os.pread(old.fileno(), end - start, start), start) == end - start


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def _directory() -> Path:
    if not _DIRECTORY:
        _DIRECTORY.append(Path(tempfile.mkdtemp(prefix="luksrotd-images-")))
        atexit.register(shutil.rmtree, _DIRECTORY[0])
    return _DIRECTORY[0]


_DIRECTORY: list[Path] = []
