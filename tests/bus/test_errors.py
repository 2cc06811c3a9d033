# SPDX-License-Identifier: GPL-2.0-or-later
"""Every error has one name on the bus, and comes back from it as itself."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from luksrotd.bus.errors import from_bus, name_of, text_of
from luksrotd.errors import Internal, Outcome, leaves

INTERFACE_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
LEAVES = sorted(leaves().items())


@pytest.mark.parametrize(("code", "leaf"), LEAVES)
def test_every_error_has_a_valid_name_and_returns(code, leaf):
    for outcome in Outcome:
        error = leaf(f"cannot do it (really) (device: {code})", outcome=outcome)
        assert INTERFACE_NAME.fullmatch(name_of(error))
        back = from_bus(name_of(error), text_of(error))
        assert (type(back), back.message, back.outcome) == (leaf, error.message, outcome)


def test_names_are_distinct():
    assert len({name_of(leaf) for _, leaf in LEAVES}) == len(LEAVES)


def test_standard_errors_have_their_standard_names():
    standard = {name_of(leaf) for _, leaf in LEAVES if not name_of(leaf).startswith("org.luksrotd1.Error.")}
    assert standard == {
        "org.freedesktop.DBus.Error.InvalidArgs",
        "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
        "org.freedesktop.DBus.Error.LimitsExceeded",
    }


def test_a_foreign_error_is_internal_and_keeps_its_text():
    for text in ("whatever", "whatever (device: sold)"):
        error = from_bus("org.freedesktop.DBus.Error.NoReply", text)
        assert (type(error), error.message, error.outcome) == (Internal, text, Outcome.UNCHANGED)


@pytest.mark.parametrize("module", ["luksrotd.bus.connection", "luksrotd.daemon", "luksrotd.ctl.remote"])
def test_dbus_next_can_be_imported_where_python_dropped_what_it_imports(module):
    program = f"import typing; vars(typing).pop('no_type_check_decorator', None); import {module}"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).resolve().parents[2])
