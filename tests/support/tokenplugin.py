# SPDX-License-Identifier: GPL-2.0-or-later
"""A token plugin of libcryptsetup's for tests (tokenplugin.c), and tokens for it."""

import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.support import kernel

TYPE: Final = "luksrotd-test"
MASK: Final = 0x5A
SOURCE: Final = Path(__file__).with_suffix(".c")


def token(
    passphrase: bytes, keyslots: Sequence[int] = (0,), *, pin: bytes | None = None, errno: int | None = None
) -> dict[str, Any]:
    """A token that gives ``passphrase``, if the PIN is right, or fails with that errno."""
    body: dict[str, Any] = {
        "type": TYPE,
        "keyslots": [str(slot) for slot in keyslots],
        "passphrase": masked(passphrase),
    }
    if pin is not None:
        body["pin"] = masked(pin)
    if errno is not None:
        body["errno"] = errno
    return body


def masked(secret: bytes) -> str:
    """As it stands in the token, where no search for the secret itself finds it."""
    return bytes(byte ^ MASK for byte in secret).hex()


def directory() -> Path:
    """Where libcryptsetup looks for plugins; compiled in."""
    return Path("/usr/lib", sysconfig.get_config_var("MULTIARCH"), "cryptsetup")


@contextmanager
def installed(scratch: Path) -> Iterator[None]:
    """The plugin beside those that are there; only in this process's mount namespace, which must be its own."""
    plugins = scratch / "plugins"
    shutil.copytree(directory(), plugins)
    target = plugins / f"libcryptsetup-token-{TYPE}.so"
    # libcryptsetup asks for the symbols by this version.
    versions = scratch / "versions"
    versions.write_text("CRYPTSETUP_TOKEN_1.0 { global: cryptsetup_token_*; local: *; };\n")
    command = [
        "cc",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-O1",
        "-fPIC",
        "-shared",
        f"-Wl,--version-script={versions}",
        str(SOURCE),
    ]
    subprocess.run([*command, "-lcryptsetup", "-o", str(target)], check=True)
    for path in (scratch, plugins):
        path.chmod(0o755)  # the worker is nobody to whom this belongs
    kernel.mount(plugins, directory(), flags=kernel.MS_BIND)
    try:
        yield
    finally:
        kernel.unmount(directory())
