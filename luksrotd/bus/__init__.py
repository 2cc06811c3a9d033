# SPDX-License-Identifier: GPL-2.0-or-later
"""D-Bus: the only package that knows dbus-next, which it hardens, and the place of the exported interfaces.

The modules that mend it, and what they are used by:

============== =====================================================================================================
``transport``  framing and writing: the socket
``connection`` ``Bus``, the connection: dispatch, exports, calls
``objects``    the exported objects, and the standard interfaces (Peer, Properties, ObjectManager and so on)
``interface``  ``Interface``, the base of every exported interface; properties and signals
``exposed``    ``@exposed``, the only way to export a method: signature, polkit action, error boundary
``values``     bodies of messages to Python values and back; received file descriptors
``caller``     who calls, and when they vanish
``guard``      asks the authority about a caller, for as long as the caller is there
``authority``  polkit
``errors``     errors to D-Bus names and back
============== =====================================================================================================

To export an object, derive from ``Interface`` and hand it to ``Bus.export``; ``interface`` has an example.
"""

import typing

if not hasattr(typing, "no_type_check_decorator"):
    # dbus-next 0.2.3 imports it, for decorators that are not used here; Python 3.15, whose types mypy may know, no
    # longer has it.
    typing.no_type_check_decorator = lambda decorator: decorator  # type: ignore[attr-defined, unused-ignore] # 3.15
