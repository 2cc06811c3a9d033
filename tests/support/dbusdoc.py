# SPDX-License-Identifier: GPL-2.0-or-later
"""The D-Bus interfaces as their XML describes them, read by packaging/dbus_doc.py, which makes the manual of them."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

from tests.support.testbed import PROJECT

XML = sorted((PROJECT / "dbus").glob("*.xml"))
TOOL = PROJECT / "packaging" / "dbus_doc.py"


def _load() -> ModuleType:
    """By its path: the folder has the name of a package that many programs import."""
    spec = importlib.util.spec_from_file_location("luksrotd_dbus_doc", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tool: Any = _load()


def interfaces() -> dict[str, Any]:
    """By name."""
    return {interface.name: interface for path in XML for interface in tool.read(path)}
