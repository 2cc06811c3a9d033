# SPDX-License-Identifier: GPL-2.0-or-later
"""The initramfs of a Debian whose root is encrypted: by initramfs-tools and cryptsetup-initramfs, and nothing of ours.

Its crypttab asks for a passphrase for the volume ``UUID``, as ``ROOT``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.beds import roots

UUID: Final = "6c756b73-726f-4464-8000-000000000001"
ROOT: Final = "cryptroot"
PACKAGES: Final = ("busybox", "cryptsetup-initramfs", "e2fsprogs", "initramfs-tools", "linux-image-cloud-amd64", "udev")
CRYPTTAB: Final = f"{ROOT} UUID={UUID} none luks,initramfs"


@dataclass(frozen=True)
class Initramfs:
    """Files to boot from; not to be written to."""

    folder: Path

    @property
    def kernel(self) -> Path:
        """The kernel."""
        return self.folder / "kernel"

    @property
    def initrd(self) -> Path:
        """The initramfs as update-initramfs(8) has packed it."""
        return self.folder / "initrd"

    @property
    def files(self) -> Path:
        """The folder that unmkinitramfs(8) makes of it."""
        return self.folder / "files"


def initramfs(release: str) -> Initramfs:
    """Made if it is not there; OSError if it cannot be made."""
    argv = [
        *(*roots.APART, "mmdebstrap", "--quiet", "--variant=minbase", "--format=directory"),
        f"--include={','.join(PACKAGES)}",
        f"--essential-hook=echo '{CRYPTTAB}' >\"$1\"/etc/crypttab",
        '--customize-hook=chroot "$1" sh -c "unmkinitramfs /boot/initrd.img-* /files"',
        release,
    ]
    key = roots.digest(json.dumps(argv).encode())
    return Initramfs(roots.made(release, f"initramfs-{key}", lambda draft: _assemble(argv, draft)))


def _assemble(argv: list[str], draft: Path) -> None:
    draft.mkdir()
    debian = draft / "debian"
    roots.run([*argv, str(debian)])
    for pattern, name in (("boot/vmlinuz-*", "kernel"), ("boot/initrd.img-*", "initrd"), ("files", "files")):
        (found,) = debian.glob(pattern)
        found.rename(draft / name)
    # With early microcode in front of it there is a folder for each archive.
    main = draft / "files" / "main"
    if main.is_dir():
        main.rename(draft / "main")
        roots.remove(draft / "files")
        (draft / "main").rename(draft / "files")
    roots.remove(debian)
