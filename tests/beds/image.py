# SPDX-License-Identifier: GPL-2.0-or-later
"""What a virtual machine boots: a disk made of a root folder, Debian's cloud kernel, and an initrd that finds the disk.

The kernel's modules (device-mapper and all) are on the disk, and so is the agent (``agent.py``).  Units that take long
and that no test needs are masked, for QEMU's emulation makes a boot ten times as long as it is.
"""

import json
import lzma
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.beds import roots

AGENT: Final = Path(__file__).with_name("agent.py")
PORT: Final = "luksrotd.bed"
DISK_SIZE: Final = "1200M"
#: What the initrd has to load before there is a disk.
DISK_MODULES: Final = ("virtio_pci", "virtio_blk")
#: Nothing in them that a machine without network, screen and sound could use.
LEFT_OUT: Final = (
    *(f"usr/lib/modules/*/kernel/drivers/{name}" for name in ("gpu", "hv", "infiniband", "media", "net", "usb")),
    *("usr/lib/modules/*/kernel/net", "usr/lib/modules/*/kernel/sound"),
    *("usr/share/doc", "usr/share/info", "usr/share/locale", "usr/share/man", "var/cache/apt", "var/lib/apt/lists"),
)
MASKED: Final = (
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "modprobe@.service",
    "proc-sys-fs-binfmt_misc.automount",
    "serial-getty@ttyS0.service",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-binfmt.service",
    "systemd-journal-flush.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-remount-fs.service",
    "systemd-update-utmp.service",
)
AGENT_UNIT: Final = rf"""[Unit]
Description=Agent of the test bed
After=dev-virtio\x2dports-{PORT}.device
BindsTo=dev-virtio\x2dports-{PORT}.device

[Service]
Type=exec
ExecStart=/usr/local/lib/bed-agent
OOMScoreAdjust=-900
# Of what a test starts in the background, an end of the agent ends nothing.
KillMode=process
"""
INIT: Final = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
for module in {modules}; do
    /bin/busybox insmod "/modules/$module"
done
while [ ! -b /dev/vda ]; do
    /bin/busybox sleep 0.02
done
/bin/busybox mount -t ext4 -o rw,noatime /dev/vda /root
/bin/busybox mount -o move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/init
"""


@dataclass(frozen=True)
class Image:
    """Files to boot from; not to be written to."""

    folder: Path

    @property
    def disk(self) -> Path:
        """The disk with the root file system, raw, without partitions."""
        return self.folder / "disk"

    @property
    def kernel(self) -> Path:
        """The kernel."""
        return self.folder / "kernel"

    @property
    def initrd(self) -> Path:
        """The initrd."""
        return self.folder / "initrd"


def image(release: str, root: Path | None = None) -> Image:
    """Made of ``root``, or of ``roots.installed(release)``; OSError if it cannot be made."""
    root = root or roots.installed(release)
    modules = kernel(release)
    key = roots.digest(b"".join(path.read_bytes() for path in (Path(__file__), AGENT)) + f"{root}{modules}".encode())
    return Image(roots.made(release, f"image-{key}", lambda draft: _assemble(root, modules, draft)))


def kernel(release: str) -> Path:
    """A folder with the unpacked package of the kernel, and of what that depends on."""
    argv = [
        *("mmdebstrap", "--quiet", "--variant=extract", "--format=directory", "--include=linux-image-cloud-amd64"),
        release,
    ]
    key = roots.digest(json.dumps(argv).encode())

    return roots.made(release, f"kernel-{key}", lambda draft: roots.run([*argv, str(draft)]))


def _assemble(root: Path, unpacked: Path, draft: Path) -> None:
    draft.mkdir()
    files = draft / "root"
    roots.run(["cp", "--archive", "--reflink=auto", str(root), str(files)])
    (found,) = (unpacked / "boot").glob("vmlinuz-*")
    shutil.copyfile(found, draft / "kernel")
    version = found.name.removeprefix("vmlinuz-")
    (modules,) = (path for path in (unpacked / "usr/lib/modules", unpacked / "lib/modules") if path.is_dir())
    roots.run(["cp", "--archive", str(modules), str(files / "usr/lib")])
    for pattern in LEFT_OUT:
        for path in files.glob(pattern):
            roots.run(["rm", "--recursive", "--force", str(path)])
    roots.run(["chroot", str(files), "depmod", version])
    _configure(files)
    _make_initrd(files, version, draft)
    roots.run(["mke2fs", "-q", "-t", "ext4", "-d", str(files), str(draft / "disk"), DISK_SIZE])
    roots.run(["rm", "--recursive", "--force", "--one-file-system", str(files)])


def _configure(files: Path) -> None:
    (files / "etc/hostname").write_text("bed\n")
    (files / "etc/fstab").write_text("/dev/vda / ext4 rw,noatime 0 0\n")
    units = files / "etc/systemd/system"
    for unit in MASKED:
        (units / unit).symlink_to("/dev/null")
    agent = files / "usr/local/lib/bed-agent"
    agent.write_text(f"#!/usr/bin/python3\n{AGENT.read_text()}")
    agent.chmod(0o755)
    (units / "bed-agent.service").write_text(AGENT_UNIT)
    wants = units / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "bed-agent.service").symlink_to("../bed-agent.service")


def _make_initrd(files: Path, version: str, draft: Path) -> None:
    folder = draft / "initrd.files"
    for name in ("bin", "dev", "modules", "root"):
        (folder / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", folder / "bin")
    names = []
    for line in _dependencies(files, version):
        module = files / line.lstrip("/")
        data = module.read_bytes()
        names.append(module.name.removesuffix(".xz"))
        (folder / "modules" / names[-1]).write_bytes(lzma.decompress(data) if module.suffix == ".xz" else data)
    init = folder / "init"
    init.write_text(INIT.format(modules=" ".join(names)))
    init.chmod(0o755)
    pack = f"cd {folder} && find . | cpio --create --format=newc --quiet --reproducible | gzip -1 >{draft}/initrd"
    roots.run(["sh", "-ec", pack])
    shutil.rmtree(folder)


def _dependencies(files: Path, version: str) -> list[str]:
    """Paths of modules, in the order in which they are to be loaded."""
    found: dict[str, None] = {}
    for name in DISK_MODULES:
        argv = ["chroot", str(files), "modprobe", "--set-version", version, "--show-depends", name]
        shown = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout
        found |= {words[1]: None for line in shown.splitlines() if (words := line.split())[0] == "insmod"}
    return list(found)
