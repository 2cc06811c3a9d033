# SPDX-License-Identifier: GPL-2.0-or-later
"""The text of docs/scale.md: the prose of ``scale.md.in``, with the numbers of docs/scale/numbers.json.  Pure."""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).parent
TOP: Final = HERE.parent.parent
PAGE: Final = TOP / "docs" / "scale.md"
FOLDER: Final = TOP / "docs" / "scale"
NUMBERS: Final = FOLDER / "numbers.json"
TEMPLATE: Final = HERE / "scale.md.in"
#: What the numbers depend on.
CODE: Final = ("chance.py", "timer.py", "fleet.py", "simulation.py", "load.py", "scenarios.py")
#: Bytes of a file of the example.
BLOCK: Final = 4096

Numbers = Mapping[str, Any]


def digest() -> str:
    """Of the code that simulates: numbers that were made by another one are found out."""
    found = sha256()
    for name in CODE:
        found.update((HERE / name).read_bytes())
    return found.hexdigest()


def page(numbers: Numbers) -> str:
    """In the template, ``{one[two][three]}`` is a number, and ``{table_NAME}`` a table."""
    tables = {f"table_{name}": make(numbers) for name, make in TABLES.items()}
    entries, broken = numbers["storage"]["entries"], numbers["storage"]["broken"] * numbers["machines"] / 100
    more = {"bytes_a_year": f"{entries * BLOCK / 1e9:.1f} GB", "broken_a_year": f"{broken:,.0f}"}
    _, _, prose = TEMPLATE.read_text(encoding="utf-8").partition("\n")  # without its licence
    return prose.format_map({**numbers, **tables, **more})


def _steady(numbers: Numbers) -> str:
    rows = [
        [name, *_load(one), f"{one['mondays']:.0%}", f"{one['late_hours']:.0f} h"]
        for name, one in numbers["steady"].items()
    ]
    header = ["", *_LOAD, "on Mondays", "oldest key: AGE and"]
    return _table(header, rows)


def _rollout(numbers: Numbers) -> str:
    rows = [
        [name, *(f"{wave['second']['max'] or '-'}" for wave in one["waves"])]
        for name, one in numbers["rollout"].items()
    ]
    return _table(["worst second", "at once", "after 90 days", "after 180 days", "after 270 days"], rows)


def _holiday(numbers: Numbers) -> str:
    rows = [
        [
            name.replace("0 weeks", "an ordinary week").replace("2 weeks", "2 weeks of holidays"),
            *_load(one)[3:],
            _at(one),
        ]
        for name, one in numbers["holiday"].items()
    ]
    return _table(["Monday", *_LOAD[3:], "worst minute at"], rows)


def _outages(numbers: Numbers) -> str:
    rows = [
        [
            name,
            f"{one['late']:,}",
            f"{one['failed']:,}",
            f"{one['peak']['second']['max']}",
            f"{one['bound']}",
            f"{one['peak']['minute']['max']}",
            f"{one['caught_up_hours']:.1f} h",
            f"{one['oldest_hours']:.0f} h",
        ]
        for name, one in numbers["outages"].items()
    ]
    return _table(_OUTAGE, rows)


def _retries(numbers: Numbers) -> str:
    rows = [
        [
            name,
            f"{one['failed']:,}",
            f"{one['peak']['second']['max']}",
            f"{one['caught_up_hours']:.1f} h",
            f"{one['wave']['second']['max']}" if "wave" in one else "",
            f"{one['wave_bound']}" if "wave" in one else "",
        ]
        for name, one in numbers["retries"].items()
    ]
    return _table(
        ["OnCalendar, RandomizedDelaySec", "failed requests", "worst second after it", "all done after",
         "all due at once: worst second", "formula"],
        rows,
    )  # fmt: skip


def _small_store(numbers: Numbers) -> str:
    rows = [
        [f"{capacity} per second", f"{one['failed']:,}", f"{one['done']:,}", f"{one['hours']:.1f} h"]
        for capacity, one in numbers["small_store"].items()
    ]
    return _table(["the store takes", "requests that time out", "rotations", "the last one after"], rows)


def _short_days(numbers: Numbers) -> str:
    found = numbers["short_days"]
    lengths = dict.fromkeys(name.split(", ")[0] for name in found)
    rows = [[one, f"{found[f'{one}, fixed']:.0%}", f"{found[f'{one}, new each time']:.0%}"] for one in lengths]
    return _table(["on for, each workday", "FixedRandomDelay=yes", "as shipped"], rows)


def _losses(numbers: Numbers) -> str:
    found = numbers["losses"]
    ages = next(iter(found.values()))
    rows = [[name, *(f"{one['lost']:,} ({one['bound']:,})" for one in row.values())] for name, row in found.items()]
    return _table(["a key is finished", *(_age(int(age)) for age in ages)], rows)


def _never_kept(numbers: Numbers) -> str:
    return _table(
        ["a key is finished", "machines whose key nobody has"],
        [[name, f"{one['lost']:,}"] for name, one in numbers["never_kept"].items()],
    )


TABLES: Final = {
    "steady": _steady,
    "rollout": _rollout,
    "holiday": _holiday,
    "outages": _outages,
    "retries": _retries,
    "small_store": _small_store,
    "short_days": _short_days,
    "losses": _losses,
    "never_kept": _never_kept,
}

_LOAD: Final = ["per second: mean", "p99", "max", "per minute: mean", "p99", "max"]
_OUTAGE: Final = [
    "fleet, outage", "machines that met it", "failed requests", "worst second after it", "formula",
    "worst minute after it", "all done after", "oldest key: AGE and",
]  # fmt: skip


def _load(one: Numbers) -> list[str]:
    second, minute = one["second"], one["minute"]
    return [
        f"{second['mean']:.3f}", f"{second['p99']}", f"{second['max']}",
        f"{minute['mean']:.2f}", f"{minute['p99']}", f"{minute['max']}",
    ]  # fmt: skip


def _at(one: Numbers) -> str:
    minutes = one["minute"]["at"] // 60 % 1440
    return f"{minutes // 60}:{minutes % 60:02}"


def _age(hours: int) -> str:
    return f"{hours} h" if hours < 24 else f"{hours // 24} d"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    ruler = ["---", *("--:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ruler, *rows))
