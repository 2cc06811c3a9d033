# SPDX-License-Identifier: GPL-2.0-or-later
"""libcryptsetup by cffi; nowhere else, and only in the worker process."""
