# SPDX-License-Identifier: GPL-2.0-or-later
"""``luksrotctl``."""

import typing

if not hasattr(typing, "no_type_check_decorator"):
    # As in ``luksrotd.bus``, which is not for clients: dbus-next 0.2.3 imports it; Python 3.15 no longer has it.
    typing.no_type_check_decorator = lambda decorator: decorator  # type: ignore[attr-defined, unused-ignore] # 3.15
