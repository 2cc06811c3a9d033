# SPDX-License-Identifier: GPL-2.0-or-later
"""Where each file of this tree that is not Python is installed: said a second time, beside ``packaging/install``."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Pattern in the tree → folder in an installed system.
FOLDERS = {
    "dbus/*.conf": "usr/share/dbus-1/system.d",
    "dbus/*.service": "usr/share/dbus-1/system-services",
    "dbus/*.xml": "usr/share/dbus-1/interfaces",
    "packaging/completions/*.fish": "usr/share/fish/vendor_completions.d",
    "packaging/completions/_*": "usr/share/zsh/vendor-completions",
    "packaging/completions/luksrotctl": "usr/share/bash-completion/completions",
    "packaging/examples/*": "usr/share/doc/luksrotd/examples",
    "polkit/*.example": "usr/share/doc/luksrotd/examples",
    "polkit/*.policy": "usr/share/polkit-1/actions",
    "systemd/*.catalog": "usr/lib/systemd/catalog",
    "systemd/*.preset": "usr/lib/systemd/system-preset",
    "systemd/*.rules": "usr/lib/udev/rules.d",
    "systemd/*.service": "usr/lib/systemd/system",
    "systemd/*.socket": "usr/lib/systemd/system",
    "systemd/*.timer": "usr/lib/systemd/system",
    "systemd/luksrotd.conf": "etc/luksrotd",
}
#: File in the tree → file in an installed system, where it has another name.
RENAMED = {
    "systemd/luksrotd.sysusers": "usr/lib/sysusers.d/luksrotd.conf",
    "systemd/luksrotd.tmpfiles": "usr/lib/tmpfiles.d/luksrotd.conf",
}
SOURCES = ("dbus", "packaging/completions", "packaging/examples", "polkit", "systemd")


def placed() -> dict[str, Path]:
    """Each file in an installed system, relative to its root, and what it is a copy of."""
    found = {target: ROOT / source for source, target in RENAMED.items()}
    for pattern, folder in FOLDERS.items():
        found |= {f"{folder}/{source.name}": source for source in ROOT.glob(pattern)}
    return found


def man_pages() -> set[str]:
    """The man pages in an installed system, relative to its root, not compressed."""
    names = (source.stem for source in (ROOT / "docs/man").glob("*.scd"))
    return {f"usr/share/man/man{name.rpartition('.')[2]}/{name}" for name in names}


def sources() -> set[Path]:
    """All files of the tree that are to be installed as they are."""
    return {path for folder in SOURCES for path in (ROOT / folder).glob("*")}


def python_files() -> set[str]:
    """The files of the Python package, relative to where Python packages lie."""
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "luksrotd").rglob("*.py")}
    return found | {"luksrotd/cryptsetup/_ffi.abi3.so"}
