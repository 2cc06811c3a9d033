# SPDX-License-Identifier: GPL-2.0-or-later
"""The contract around the verbs: exit statuses, help, the man page, what is loaded when."""

import argparse
import re
import subprocess
import sys

import pytest

from luksrotd import __version__
from luksrotd.ctl.cli import build_parser
from luksrotd.ctl.exits import Exit, status_of, worst
from luksrotd.ctl.naming import uuid_of
from luksrotd.errors import Outcome, leaves
from tests.ctl.conftest import CHEAP, KEY, NEXT, ROOT, environment, fails, works


def verbs_of(parser, *path):
    """All verbs with their parsers, "header backup" say."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield " ".join(path), parser
    for action in nested:
        for name, verb in action.choices.items():
            yield from verbs_of(verb, *path, name)


VERBS = dict(verbs_of(build_parser()))
DIRECT_ONLY = [name for name, verb in VERBS.items() if not verb.get_default("bus")]
STATUS = {
    "InvalidArgs": 2,
    "NeedsPerson": 3,
    "NotAuthorized": 5,
    "InteractiveAuthorizationRequired": 5,
    "Busy": 6,
    "LockTimeout": 6,
    "Conflict": 6,
    "StaleGeneration": 6,
    "LimitsExceeded": 6,
}
MAN = ROOT / "docs" / "man" / "luksrotctl.1.scd"


@pytest.mark.parametrize("code", sorted(leaves()))
def test_every_error_has_its_exit_status(code):
    assert status_of(leaves()[code]("cannot")) == STATUS.get(code, 1)
    for outcome in set(Outcome) - {Outcome.UNCHANGED}:
        assert status_of(leaves()[code]("cannot", outcome=outcome)) == 4


def test_the_worst_status_counts():
    assert worst([]) == Exit.DONE
    assert worst([Exit.DONE, Exit.BUSY]) == Exit.BUSY
    assert worst([Exit.UNKNOWN, Exit.PERSON, Exit.FAILED]) == Exit.UNKNOWN


def test_uuids():
    uuid = "0B7D65A2-0000-4000-8000-00000000000a"
    assert uuid_of(uuid) == uuid_of(f"UUID={uuid}") == uuid.lower()
    assert uuid_of("/dev/sda") is None


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help(verb):
    text = works(*verb.split(), "--help")
    assert "example" in text
    assert f"luksrotctl {verb}".strip() in text
    assert ("Works with --direct only" in text) == (verb in DIRECT_ONLY)


def test_help_lists_every_verb():
    listed = re.findall(r"^  ([a-z][a-z -]*?)  +\S", works("--help"), re.MULTILINE)
    assert set(VERBS) <= set(listed)


@pytest.mark.parametrize("verb", DIRECT_ONLY)
def test_no_bus_yet(verb):
    required = [action.metavar for action in VERBS[verb]._actions if not action.option_strings and action.nargs != "*"]
    options = [
        f"{action.option_strings[0]}=1" for action in VERBS[verb]._actions if action.required and action.option_strings
    ]
    assert "use --direct" in fails(2, *verb.split(), *required, *options)["message"]


def test_version():
    assert works("--version") == f"luksrotctl {__version__}\n"


def test_man_page_builds_and_names_every_option_and_status():
    page = MAN.read_text()
    built = subprocess.run(["scdoc"], input=page.encode(), capture_output=True, check=True)
    assert built.stderr == b""
    parsers = [build_parser(), *VERBS.values()]
    options = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    named = set(re.findall(r"\*(--?[a-z-]+)\*", page))
    assert options - {"-h"} <= named
    assert named - options == set()
    assert {int(number) for number in re.findall(r"^\S+\s+\*(\d)\*$", page, re.MULTILINE)} == set(Exit)
    assert all(f"*{verb}*" in page for verb in VERBS)


def loaded(*arguments):
    program = "from luksrotd.ctl.program import command; command()"
    command = [sys.executable, "-P", "-X", "importtime", "-c", program, *map(str, arguments)]
    nowhere = environment(DBUS_SYSTEM_BUS_ADDRESS="unix:path=/nonexistent")
    done = subprocess.run(command, env=nowhere, capture_output=True, text=True, check=False)
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_each_way_loads_only_what_it_needs():
    bus = loaded("list")
    assert "dbus_next" in bus
    assert not [
        name for name in bus if name.startswith(("luksrotd.host", "luksrotd.service", "luksrotd.luks2", "rich"))
    ]
    direct = loaded("--direct", "show", "/dev/null")
    assert "luksrotd.direct" in direct
    assert not [name for name in direct if name.startswith(("dbus_next", "rich", "luksrotd.cryptsetup"))]


def test_a_rotation_loads_nothing_that_other_verbs_need(enrolled, secret):
    others = ("backupfile", "history", "live", "udev"), ("headers", "history", "planning", "sets", "stepwise")
    unused = {
        f"luksrotd.{package}.{name}"
        for package, names in zip(("host", "service"), others, strict=True)
        for name in names
    }
    unused |= {f"luksrotd.ctl.{name}" for name in ("calls", "connection", "keys", "offline", "remote", "staging")}
    unused |= {"_ssl", "dbus_next", "pyudev", "rich"}
    found = loaded("--direct", "rotate", enrolled, "-d", secret(KEY), "--new-keyfile", secret(NEXT), *CHEAP)
    assert "luksrotd.service.volume" in found
    assert unused & found == set()
    # The worker starts while these are being read in.
    assert not {"asyncio", "luksrotd.direct"} & loaded("rotate", enrolled, "--engine", "stepwise")
