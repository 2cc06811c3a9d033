# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/scale.md says what the code says."""

import json
import re
from typing import Any

import pytest

from luksrotd.ctl import cli
from tests.scale.fleet import Fleet
from tests.scale.page import FOLDER, NUMBERS, PAGE, digest, page
from tests.scale.scenarios import SCENARIOS
from tests.scale.simulation import run
from tests.scale.timer import DAY


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(NUMBERS.read_text(encoding="utf-8"))
    return found


def test_the_numbers_are_of_this_code(numbers: dict[str, Any]) -> None:
    assert numbers["code"] == digest(), "make scale"


def test_the_page_is_of_these_numbers(numbers: dict[str, Any]) -> None:
    assert PAGE.read_text(encoding="utf-8") == page(numbers), "make scale"


def test_the_code_gives_these_numbers(numbers: dict[str, Any]) -> None:
    """One of them; all would take minutes."""
    found = run(Fleet(100, broken=100, enrolled=1), 365 * DAY)
    assert len(found.requests) / 100 == numbers["storage"]["broken"]


def test_every_question_can_be_answered() -> None:
    """With a small fleet; that of other answers takes longer."""
    for name in ("holiday", "outages", "retries", "small_store", "short_days"):
        assert SCENARIOS[name](100)


def test_the_simulated_peaks_are_within_the_formulas(numbers: dict[str, Any]) -> None:
    """But for desktops, which come on nearly at the same time: their formula is another one."""
    for name, one in numbers["outages"].items():
        assert name.startswith("desktops") or one["peak"]["second"]["max"] <= one["bound"]
    for one in numbers["retries"].values():
        assert "wave" not in one or one["wave"]["second"]["max"] <= one["wave_bound"]
    assert numbers["steady"]["servers"]["second"]["max"] <= numbers["steady"]["servers"]["bound"]


def test_figures_are_there_and_have_no_dates() -> None:
    shown = re.findall(r"!\[[^]]+\]\(scale/([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(path.name for path in FOLDER.glob("*.svg"))
    for name in shown:
        assert "dc:date" not in (FOLDER / name).read_text(encoding="utf-8")


def test_the_commands_of_the_page_are_luksrotctls() -> None:
    found = re.findall(r"^luksrotctl (.+?)(?:\s+#.*)?$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) == 3
    for command in found:
        cli.parse(command.replace('"$uuid"', "0").split())
