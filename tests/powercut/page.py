# SPDX-License-Identifier: GPL-2.0-or-later
"""The text of docs/power-cuts.md, from what the campaign has found.  Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.powercut.inside import Result
from tests.powercut.scenarios import SCENARIOS
from tests.support.leftovers import Leftover

KINDS = tuple(str(kind) for kind in Leftover)


def wrong(results: Iterable[Result]) -> list[str]:
    """What must not be: violations of ours, and a control in which nothing was found."""
    found = []
    for r in results:
        scenario = SCENARIOS[r.scenario]
        if scenario.ours and not scenario.ignore_flushes:
            found += [f"{r.release}, {r.scenario}, {name}: {'; '.join(whats)}" for name, whats in r.violations]
        elif not r.wrong:
            found.append(f"{r.release}, {r.scenario}: no violation was found")
    return found


def page(results: Sequence[Result], meta: Mapping[str, Any], kills: Sequence[Mapping[str, Any]]) -> str:
    """``meta``: date, command, seed, minutes; ``kills``: rows of what the machines that were killed have shown."""
    ours = [r for r in results if not _control(r)]
    controls = [r for r in results if _control(r)]
    found = wrong(results)
    verdict = "**no violation**" if not found else f"**{len(found)} findings**: {'; '.join(found[:20])}"
    parts = [
        f"""# Power cuts

What a machine finds after its power failed, made of recordings of real machines and judged one by one. This page is
written by the campaign itself, of {meta["date"]}, in {meta["minutes"]:.0f} minutes on {meta["processors"]} processors:

```sh
{meta["command"]}
```

{len(ours)} recordings, {_sum(ours, "distinct"):,} distinct states of the disk, {_sum(ours, "reconciled"):,} of them
reconciled: {verdict}.""",
        HOW,
        "## What was found",
        RESULTS,
        *(f"{_machine(results, release)}\n\n{_table(_HEADER, [_row(r) for r in ours if r.release == release])}"
          for release in dict.fromkeys(r.release for r in ours)),
        "## What must be found",
        CONTROLS,
        _table(["control", "release", "states", "with a violation", "which"], [_control_row(r) for r in controls]),
        "## Machines that were killed",
        KILLS,
        _kills(kills),
        AGAIN.format(seed=meta["seed"]),
    ]  # fmt: skip
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


HOW = """## How

A virtual machine boots Debian, installs nothing but the package, and has one disk: on its partitions lie the file
system with the daemon's state, where other writers are at work as in any `/var`, and one or two LUKS2 volumes (headers
of 16 KiB, key of 512 bit), each mapped by dm-crypt, mounted, and written to with fsync(2) all the time. QEMU's driver
blklogwrites records each write and each flush that reaches the disk, in their order, while luksrotctl does its work
through the daemon. The end of each step is marked on the disk too, once the program has said that it is done.

From that, states of the disk after a power cut (`tests/powercut/states.py`): all that was written before the last
flush is there, and of what was written since then

- every prefix; all but one write; one write alone;
- each write to a header torn: the first or last sectors or 4096 bytes, half, every other sector, a sector of garbage;
- at random (seeded) any subset of the writes and of their sectors, in which sectors may be garbage. So the order of
  writes within an epoch counts for nothing.

A write counts as durable with the next flush. Sectors of the state file system are old or new, never garbage. States
are distinct if the bytes of the headers, keyslot areas or of the state file system differ; what the busy volume holds
makes no state.

Each state is then judged from outside, by the cryptsetup command of the release (`tests/powercut/judge.py`):

1. *As the initramfs finds it*, before anything of ours runs: the passphrases open. By both header copies, and by each
   valid one alone, the header says exactly what it said before the step or what it says after it, foreign keyslot and
   token included, and exactly the keys of that side open; so the token on the disk describes the key that opens. If
   the step was marked as done, only what it says after it.
2. *As boot leaves it*: the state file system is mounted (ext4 replays its journal) and
   `luksrotctl --direct reconcile DEVICE` runs, as luksrotd-reconcile@.service runs it, with the package that is
   installed. It ends with status 0, and the same as in 1 holds. Both copies are valid and equal; no wipe intent is
   left; no keyslot is without a token, no token without its keyslot or with another key's; there is one pair (two if
   staged); no area of an old key is intact. The sequence number has risen with what has changed.
3. *Once more*: the command says that the volume is clean, and not a byte of the volume nor a file of the state changes.
   (Left out where the first run found nothing to do and changed nothing: that was it.)

luksrotctl runs as a fork of a process that has it loaded, in one state of 50 as the program itself; its worker and
wipefs(8) are always processes."""

RESULTS = """"Writes": to headers and keyslot areas, to the state file system, to the data of the volumes. "Repaired":
reconcile changed something. "A cut leaves": before reconcile, in how many states.
"""

CONTROLS = """The same judge on what must not pass: other tools' ways to put a new backup key in place of an old one,
recorded and cut alike (nothing reconciles them), and our own rotation on a disk that ignores flushes."""

KILLS = """A machine that is killed loses what its kernel had not yet written, nothing else; so it proves less than the
states above, but all of it is real: SIGKILL of QEMU in a rotation, boot, the reconcile unit, and the volume checked."""

AGAIN = """## Again

```sh
make powercut SEED={seed}                                       # all of it, and this page
make powercut RELEASE=trixie SCENARIO=rotation MINUTES=10       # a part; the page stays
make powercut RELEASE=trixie SCENARIO=rotation STATE=e12.torn0.odd   # one state of the recording that is there
make powercut-sample                                            # what CI does
```

Recordings stay in `build/powercut/RELEASE/SCENARIO` (`RECORD=always` makes them anew); where a state fails, the
recording and the findings are kept in `build/powercut/failed`. A state has the same name, and is the same, on the same
recording: `e12` is the epoch that was cut, `first3` what of it is there. Recordings differ from run to run: salts and
keys are random, and nobody orders the writers of a machine."""

_HEADER = [
    "scenario",
    "writes",
    "flushes",
    "states",
    "reconciled",
    "repaired",
    "violations",
    "a cut leaves",
    "after reconcile",
]


def _row(r: Result) -> list[str]:
    headers = sum(count for part, count in r.writes.items() if part not in ("state", "marks", "data"))
    writes = f"{headers} + {r.writes.get('state', 0)} + {r.writes.get('data', 0)}"
    counts = [f"{count:,}" for count in (r.flushes, r.distinct, r.reconciled, r.repaired, r.wrong)]
    return [r.scenario, writes, *counts, _kinds(r.before), _kinds(r.after)]


def _control_row(r: Result) -> list[str]:
    name = r.scenario.removeprefix("control: ")
    return [name, r.release, f"{r.distinct:,}", f"{r.wrong:,}", _kinds(r.before)]


def _control(r: Result) -> bool:
    return not SCENARIOS[r.scenario].ours or SCENARIOS[r.scenario].ignore_flushes


def _machine(results: Sequence[Result], release: str) -> str:
    r = next(r for r in results if r.release == release)
    return (
        f"### {release.capitalize()}\n\nRecorded on Linux {r.machine[0]}, judged by cryptsetup {r.cryptsetup} and "
        f"luksrotd {r.luksrotd} on Linux {r.kernel}."
    )


def _kills(kills: Sequence[Mapping[str, Any]]) -> str:
    if not kills:
        return "`make vm-test` does that; its count is not in this run."
    columns = list(dict.fromkeys(key for row in kills for key in row))
    return _table(columns, [[str(row.get(column, "")) for column in columns] for row in kills])


def _kinds(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{kind}: {counts[kind]:,}" for kind in KINDS if counts.get(kind)) or "nothing"


def _sum(results: Iterable[Result], name: str) -> int:
    return sum(getattr(r, name) for r in results)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    ruler = ["---", *("--:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ruler, *rows))
