# SPDX-License-Identifier: GPL-2.0-or-later
"""The form of the keys that luksrotd makes: systemd's recovery keys.

256 bit in modhex, in groups of four bytes with dashes between them (systemd-cryptenroll(1) ``--recovery-key``,
src/shared/recovery-key.h).
"""

from typing import Final

MODHEX: Final = b"cbdefghijklnrtuv"
RANDOM_BYTES: Final = 32
GROUP_BYTES: Final = 4
FORMATTED_LENGTH: Final = 2 * RANDOM_BYTES + RANDOM_BYTES // GROUP_BYTES - 1


def write_recovery_key(random: memoryview, text: memoryview) -> None:
    """Write ``RANDOM_BYTES`` bytes as ``FORMATTED_LENGTH`` characters; no Python object ever holds more than one."""
    position = 0
    for index, byte in enumerate(random):
        if index and index % GROUP_BYTES == 0:
            text[position] = ord("-")
            position += 1
        text[position] = MODHEX[byte >> 4]
        text[position + 1] = MODHEX[byte & 0xF]
        position += 2
