# SPDX-License-Identifier: GPL-2.0-or-later
"""Keyslots in a cipher that OpenSSL has not: libcryptsetup asks the kernel, by a socket that the sandbox forbids."""

from tests.beds.machine import restored
from tests.installed.vm.volumes import FILES, kit, managed

FORMAT = """
cryptsetup luksFormat --batch-mode --type luks2 --cipher serpent-xts-plain64 --key-size 512 --pbkdf pbkdf2 \
    --pbkdf-force-iterations 1000 --key-file old /dev/vdb
opens /dev/vdb old
lsmod | grep algif_skcipher
"""
REFUSED = """
sum() { head -c 16M /dev/vdb | sha256sum; }
before=$(sum)
job=$(start Enroll /dev/vdb old backup)
ended $job
[ "$(sum)" = "$before" ]
"""
#: As luksrotd(8) has it, under CIPHERS.
ALLOWED = """
mkdir /etc/systemd/system/luksrotd.service.d
cat >/etc/systemd/system/luksrotd.service.d/override.conf <<END
[Service]
RestrictAddressFamilies=AF_ALG
END
systemctl daemon-reload
systemctl restart luksrotd
done_well $(start Enroll /dev/vdb old backup)
opens /dev/vdb backup
"""
DIRECT = """
luksrotctl --direct rotate /dev/vdb --key-file=backup --new-keyfile=new --pbkdf=pbkdf2 --pbkdf-force-iterations=1000
opens /dev/vdb new
! opens /dev/vdb backup
"""


def test_a_cipher_of_the_kernel_is_refused_by_the_daemon_unless_allowed(tmp_path):
    disk = tmp_path / "disk"
    with restored("bookworm", disk=disk) as machine:
        machine.check(kit(FORMAT), FILES)
        state, outcome, error, message = machine.check(kit(REFUSED), FILES).splitlines()
        assert (state, outcome) == ('s "failed"', 's "unchanged"'), message
        assert error.startswith('s "org.luksrotd1.Error.'), error
        assert message.startswith('s "cannot '), message
        assert "serpent" in message, message
        assert not managed(disk)
        machine.check(kit(ALLOWED), FILES)
        machine.check(kit(DIRECT), FILES)
    (token,) = managed(disk)
    assert token["keyslots"]
