# SPDX-License-Identifier: GPL-2.0-or-later
"""What README.md and docs/ tell a reader to type, and where they send him, is there."""

import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from luksrotd.ctl import cli
from luksrotd.errors import InvalidRequest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def commands(program):
    """The words of every command of the program in README's shell blocks, without the program itself."""
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.findall(rf"(?:^|&& |\$\(){program} ([^|#\n]+)", line):
                yield shlex.split(command)


def method(interface, name):
    """The signature of a method's arguments, by the file that is the source of the API."""
    root = ElementTree.parse(ROOT / "dbus" / f"{interface}.xml").getroot()
    (found,) = root.findall(f"interface[@name='{interface}']/method[@name='{name}']")
    return "".join(arg.get("type") for arg in found.findall("arg[@direction='in']"))


def test_luksrotctl_understands_every_command():
    found = list(commands("luksrotctl"))
    assert {words[1] if words[0] == "--direct" else words[0] for words in found} >= {
        "enroll",
        "rotate",
        "show",
        "reconcile",
    }
    for words in found:
        cli.parse(words)


def test_a_wrong_command_would_be_seen():
    with pytest.raises(InvalidRequest):
        cli.parse(["rotate", "disk.img", "--keyfile", "old.key"])


def test_busctl_calls_what_there_is():
    calls = [words[1:] for words in commands("busctl") if words[0] == "call"]
    assert len(calls) == 2
    for _, _, interface, name, signature, *_ in calls:
        assert method(interface, name) == signature


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_make_knows_every_target():
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    phony = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"demo", "test"} <= targets
    assert targets <= set(" ".join(phony).split())


@pytest.mark.parametrize("page", ["architecture.md", "hacking.md"])
def test_modules_that_are_named_are_there(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:[a-z0-9_]+/)+[a-z0-9_]+\.py)`", text)
    assert named
    assert [path for path in named if not any((ROOT / top / path).exists() for top in (".", "luksrotd", "tests"))] == []
