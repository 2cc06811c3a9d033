# SPDX-License-Identifier: GPL-2.0-or-later
"""The unprivileged process that runs libcryptsetup on a shadow of the header."""
