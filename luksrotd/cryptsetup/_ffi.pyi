# SPDX-License-Identifier: GPL-2.0-or-later
"""What ffi_build.py makes; cffi has no types to give, api.py and its neighbours put them on."""

from typing import Any

ffi: Any
lib: Any
