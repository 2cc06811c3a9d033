# SPDX-License-Identifier: GPL-2.0-or-later
"""luksrotd: transactional changes of LUKS2 keyslots and tokens."""

__version__ = "0.1.0"
