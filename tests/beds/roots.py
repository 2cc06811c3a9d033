# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian in a folder: what containers and virtual machines boot.

    root = roots.installed("trixie")

A root is made once, under ``build/beds`` (the environment's ``LUKSROTD_BEDS`` names another folder), and its name tells
what it is made of.  Nobody may write to it: who boots it lays an overlay over it, or copies it.  Needs root, and
mmdebstrap.
"""

import fcntl
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.support.kernel import die_with_parent

PROJECT: Final = Path(__file__).resolve().parents[2]
RELEASES: Final = ("bookworm", "trixie")

#: What a Debian has that boots, and that has encrypted volumes.
PACKAGES: Final = (
    "cryptsetup-bin",
    "dbus",
    "dmsetup",
    "e2fsprogs",
    "fdisk",
    "kmod",
    "mount",
    "polkitd",
    "procps",
    "python3",
    "systemd",
    "systemd-sysv",
    "udev",
    "util-linux",
)
#: What our package depends on, and recommends: not installed, but lying where apt looks before it asks a mirror.
CACHED: Final = (
    "libcryptsetup12",
    "python3-cffi",
    "python3-cffi-backend",
    "python3-dbus-next",
    "python3-pyudev",
    "python3-rich",
    "python3-systemd",
)
#: Processes and mounts of its own: Debian's scripts end a polkitd that runs, by the path of its program, and would find
#: the machine's.
APART: Final = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
#: Of no use in a bed: what waits for a person or a network, or works at odd hours.
MASKED: Final = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty.target",
    "systemd-firstboot.service",
    "systemd-networkd-persistent-storage.service",
    "systemd-timesyncd.service",
)
#: No first boot, at which systemd would enable and disable units by their presets.
MACHINE_ID: Final = "6c756b73726f74646c756b73726f7464"
#: A root that nobody has asked for so long is removed when its successor is made.
KEPT_SECONDS: Final = 6 * 3600


def folder() -> Path:
    """Where the roots are."""
    return Path(os.environ.get("LUKSROTD_BEDS") or PROJECT / "build" / "beds").absolute()


def base(release: str) -> Path:
    """A fresh Debian in which ``apt install`` of our package works without network.  OSError if it cannot be made."""
    argv = _debian(release)
    key = digest(json.dumps([argv, MASKED, MACHINE_ID]).encode())
    return made(release, f"base-{key}", lambda root: _bootstrap(argv, root))


def installed(release: str, package: Path | None = None) -> Path:
    """The same with our package installed; it is the one in ``build/deb`` unless another is given."""
    package = package or deb()
    below = _complete(release)
    key = digest(below.name.encode() + package.read_bytes())
    return made(release, f"installed-{key}", lambda root: _install(below, package, root))


def _complete(release: str) -> Path:
    """The base with all that our package needs, so that a package that was built anew is installed soon."""
    below = base(release)
    script = f"""apt-get --quiet --quiet --yes install {" ".join(CACHED)}
        apt-mark auto {" ".join(CACHED)} >/dev/null
        apt-get clean
        rm --recursive /var/lib/apt/lists"""
    key = digest(f"{below.name} {script}".encode())
    return made(release, f"complete-{key}", lambda root: _changed(below, root, script))


def deb() -> Path:
    """The package that ``make deb`` has built; FileNotFoundError if there is none, or more than one."""
    found = sorted((PROJECT / "build" / "deb").glob("luksrotd_*_amd64.deb"))
    if len(found) != 1:
        raise FileNotFoundError(f"cannot take the package from build/deb: {len(found)} there; run make deb")
    return found[0]


def _debian(release: str) -> list[str]:
    """The command that makes it, but for the folder."""
    fetch = (
        'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get --quiet --quiet --yes --download-only'
        f" --option APT::Install-Recommends=true install {' '.join(CACHED)}"
    )
    return [
        *APART,
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        "--format=directory",
        f"--include={','.join(PACKAGES)}",
        "--skip=cleanup/apt",
        '--customize-hook=rm -f "$1"/var/cache/apt/archives/*.deb',
        f"--customize-hook={fetch}",
        release,
    ]


def _bootstrap(argv: list[str], root: Path) -> None:
    run([*argv, str(root)])
    root.chmod(0o755)
    (root / "etc/machine-id").write_text(f"{MACHINE_ID}\n")
    (root / "etc/fstab").write_text("")
    for unit in MASKED:
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")


def _install(below: Path, package: Path, root: Path) -> None:
    _changed(below, root, "apt-get --quiet --quiet --yes install /run/host/luksrotd.deb", package)


def _changed(below: Path, root: Path, script: str, package: Path | None = None) -> None:
    """A copy of a root in which a shell script was run, without network."""
    run(["cp", "--archive", "--reflink=auto", str(below), str(root)])
    run(
        [
            *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--link-journal=no", "--console=pipe"),
            *("--private-network", "--resolv-conf=off", "--timezone=off", f"--directory={root}"),
            *([f"--bind-ro={package}:/run/host/luksrotd.deb"] if package else []),
            *("--as-pid2", "/bin/sh", "-ec", f"export DEBIAN_FRONTEND=noninteractive\n{script}"),
        ]
    )


def made(release: str, name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name, made if it is not there, by one process only; ``make`` gets a path that is free."""
    if release not in RELEASES:
        raise ValueError(f"cannot make a root of {release}")
    root = folder() / release / name
    root.parent.mkdir(parents=True, exist_ok=True)
    with _locked(root.parent / f".{name.partition('-')[0]}.lock"):
        if not root.exists():
            _remove_old(root)
            draft = root.with_name(f".{name}.new")
            remove(draft)
            make(draft)
            draft.rename(root)
        used = root.with_name(f".{name}.used")
        used.touch()
    return root


def _remove_old(root: Path) -> None:
    """Remove the roots of its kind that nobody has asked for lately."""
    for used in root.parent.glob(f".{root.name.partition('-')[0]}-*.used"):
        if time.time() - used.stat().st_mtime > KEPT_SECONDS:
            remove(used.with_name(used.name.removeprefix(".").removesuffix(".used")))
            used.unlink()


def remove(root: Path) -> None:
    """Remove a folder with all that is in it, but nothing that is mounted there."""
    run(["rm", "--recursive", "--force", "--one-file-system", str(root)])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(argv: list[str]) -> None:
    """Run a command to its end, without input; OSError, with what it said, unless status 0."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        preexec_fn=die_with_parent,
    )
    if done.returncode:
        raise OSError(f"cannot make a root: {argv[0]} ended with {done.returncode}\n{done.stdout}")


def digest(data: bytes) -> str:
    """What makes a name of what something is made of."""
    return hashlib.sha256(data).hexdigest()[:16]
