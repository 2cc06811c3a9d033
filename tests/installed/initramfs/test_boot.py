# SPDX-License-Identifier: GPL-2.0-or-later
"""A boot from an encrypted root that was cut in the midst of a rotation: Debian's kernel and initramfs, a passphrase
typed at the console, and the root file system behind it."""

import ctypes
import ctypes.util
import re
import select
import shutil
import socket
import subprocess
import time

import pytest

from tests.beds.initramfs import ROOT, UUID, initramfs
from tests.beds.machine import HARDWARE
from tests.support.crash import Enumeration
from tests.support.crashjudge import pair_of
from tests.support.crashverbs import SECRETS, VERBS, described
from tests.support.kernel import die_with_parent
from tests.support.makeimage import set_uuid
from tests.support.realvolume import Geometry, RealVolume, carried, epochs_of, prepared, volume_key_of

SECONDS = 300
#: All that there is in the root file system.
READY = "the root file system is there"
INIT = f"""#!/busybox sh
/busybox echo "{READY}"
/busybox poweroff -f
"""
WORDS = "console=ttyS0 quiet panic=1 mitigations=off no_timer_check tsc=reliable"
HALF = Geometry().headers // 2
#: One release for each state: what differs between the states is libcryptsetup's and udev's, not the kernel's.
CUTS = {
    "primary header torn": "bookworm",
    "secondary header torn": "trixie",
    "between the headers": "bookworm",
}


def encrypted(key, clear, size):
    """aes-xts-plain64 with sectors of that size, numbered in units of 512 bytes as in the device-mapper: by OpenSSL."""
    crypto = ctypes.CDLL(ctypes.util.find_library("crypto"))
    crypto.EVP_CIPHER_CTX_new.restype = crypto.EVP_aes_256_xts.restype = ctypes.c_void_p
    context = ctypes.c_void_p(crypto.EVP_CIPHER_CTX_new())
    cipher = ctypes.c_void_p(crypto.EVP_aes_256_xts())
    output, length = ctypes.create_string_buffer(size), ctypes.c_int()
    sectors = []
    for start in range(0, len(clear), size):
        tweak = (start // 512).to_bytes(16, "little")
        assert crypto.EVP_EncryptInit_ex(context, cipher, None, key, tweak) == 1
        assert crypto.EVP_EncryptUpdate(context, output, ctypes.byref(length), clear[start : start + size], size) == 1
        sectors.append(output.raw[: length.value])
    crypto.EVP_CIPHER_CTX_free(context)
    return b"".join(sectors)


@pytest.fixture(scope="module")
def rotation(tmp_path_factory):
    """The crash states of a rotation of the volume that the initramfs looks for."""
    path = tmp_path_factory.mktemp("rotation") / "volume"
    path.write_bytes(prepared("rotation"))
    set_uuid(path, UUID)
    before = path.read_bytes()
    with carried(before, Geometry()) as ref:
        volume = RealVolume(ref)
        VERBS["rotation"].operate(volume)
        return Enumeration(before, epochs_of(volume.log)[:-1], Geometry().headers)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The root file system, in clear."""
    folder = tmp_path_factory.mktemp("root")
    for name in ("dev", "proc", "run", "sbin", "sys"):
        (folder / "files" / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", folder / "files")
    init = folder / "files/sbin/init"
    init.write_text(INIT)
    init.chmod(0o755)
    # Blocks as large as the sectors of the volume.
    options = ("-q", "-t", "ext4", "-b", "4096", "-O", "^has_journal", "-d", str(folder / "files"))
    subprocess.run(["mke2fs", *options, str(folder / "image"), "4M"], check=True)
    return (folder / "image").read_bytes()


def state(rotation, cut):
    if cut == "between the headers":
        return rotation.starts[2]
    epoch, place, magic = {
        "primary header torn": (1, 0, b"LUKS\xba\xbe"),
        "secondary header torn": (2, HALF, b"SKUL\xba\xbe"),
    }[cut]
    images = (crash.image(rotation.starts[epoch]) for crash in rotation.crashes([epoch]))
    return next(image for image in images if image.read(place, 6) != magic)


def disk(image, root):
    """The whole disk: the state, and behind it the root file system."""
    segment = pair_of(image).winner.metadata.raw["segments"]["0"]
    assert segment["encryption"] == "aes-xts-plain64"
    key = volume_key_of(bytes(image))
    return bytes(image)[: int(segment["offset"])] + encrypted(key, root, segment["sector_size"])


class Console:
    """A machine, and its serial console."""

    def __init__(self, boot, disk):
        self._socket, theirs = socket.socketpair()
        self._said = b""
        self._process = subprocess.Popen(
            [
                *("qemu-system-x86_64", *HARDWARE),
                *("-kernel", str(boot.kernel), "-initrd", str(boot.initrd)),
                *("-append", f"root=/dev/mapper/{ROOT} ro {WORDS}"),
                *("-drive", f"if=virtio,format=raw,file={disk}"),
                *("-chardev", f"socket,id=console,fd={theirs.fileno()}", "-serial", "chardev:console"),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            preexec_fn=die_with_parent,  # noqa: PLW1509 - takes no lock
        )
        theirs.close()

    def wait_for(self, text):
        """Until the machine has said so, since the last time."""
        deadline = time.monotonic() + SECONDS
        while not (found := re.search(re.escape(text.encode()), self._said)):
            ready, _, _ = select.select([self._socket], [], [], max(deadline - time.monotonic(), 0))
            data = self._socket.recv(65536) if ready else b""
            assert data, self._said.decode(errors="replace")
            self._said += data
        self._said = self._said[found.end() :]

    def type(self, line):
        self._socket.sendall(line + b"\n")

    def close(self):
        self._process.kill()
        self._process.wait()
        self._socket.close()


@pytest.mark.parametrize("cut", CUTS)
def test_the_machine_boots(cut, rotation, root, tmp_path):
    boot = initramfs(CUTS[cut])
    image = state(rotation, cut)
    (name,) = (one for token in pair_of(image).winner.metadata.raw["tokens"].values() if (one := described(token)))
    path = tmp_path / "disk"
    path.write_bytes(disk(image, root))
    console = Console(boot, path)
    try:
        console.wait_for(f"Please unlock disk {ROOT}")
        console.type(SECRETS[name])
        console.wait_for(f"{ROOT}: set up successfully")
        console.wait_for(READY)
    finally:
        console.close()
