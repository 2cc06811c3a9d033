# SPDX-License-Identifier: GPL-2.0-or-later
"""The text of docs/crash-states.md, from what the crash campaign has found."""

import datetime
from collections.abc import Iterable, Mapping, Sequence

from tests.crash.cells import METADATA, MUTANT, PEER, REAL, SIMULATED, STEPS, Result
from tests.support.crashverbs import VERBS
from tests.support.leftovers import Leftover
from tests.support.makeimage import run
from tests.support.peers import PEERS

#: The columns of the comparison: what all of them do is to put a new backup key in place of an old one.
COMPARED = ((REAL, "rotation"), (STEPS, "rotation"), *((PEER, name) for name in PEERS))
KINDS = tuple(str(kind) for kind in Leftover)


def wrong(results: Iterable[Result]) -> list[str]:
    """What must not be: violations, and whatever reconcile has not cleaned up."""
    found = [f"{r.cell.part} {r.cell.name} [{r.cell.geometry}]: {what}" for r in results for what in r.violations]
    for r in results:
        left = {kind: count for kind, count in r.after.items() if kind != Leftover.GHOST}
        found += [f"{r.cell.part} {r.cell.name} [{r.cell.geometry}]: after reconcile {kind} in {count} states"
                  for kind, count in left.items()]  # fmt: skip
    return found


def page(results: Sequence[Result], command: str, seconds: float) -> str:
    """The text of docs/crash-states.md."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    version = run("--version").split()[1]
    parts = {part: [r for r in results if r.cell.part == part] for part in (SIMULATED, REAL, STEPS, PEER, MUTANT)}
    return "\n".join(
        [
            _intro(today, version, command, seconds, results),
            _comparison(results),
            _operations(parts[REAL] + parts[STEPS]),
            _geometries("Real volumes, every geometry", REAL_TEXT, parts[REAL]),
            _geometries("Simulated volumes", SIMULATED_TEXT, parts[SIMULATED]),
            _mutants(parts[MUTANT]),
        ]
    )


def _intro(today: str, version: str, command: str, seconds: float, results: Sequence[Result]) -> str:
    found, examined = wrong(results), [r for r in results if r.cell.part != MUTANT]
    states, reconciled = sum(r.states for r in examined), sum(r.reconciled for r in examined)
    verdict = "**no violation**" if not found else f"**{len(found)} violations**: {'; '.join(found[:20])}"
    return f"""# Crash states

What a power cut can leave, counted and judged. This page is written by the run itself, of {today} on libcryptsetup
{version}, in {seconds / 60:.0f} minutes:

```sh
{command}
```

{len(examined)} enumerations, {states:,} crash states, {reconciled:,} reconciles: {verdict}.

The model is that of [the commit protocol](spec/commit-protocol.md): within the epoch (all writes between two flushes)
that is cut, each changed header sector is old, new or garbage, independently, and where it is written twice it may
hold the first content, too; so every prefix, subset, order and tear is in it. Key areas, of which only "intact or not"
can be seen, go through ten classes (nothing, all, all but the first or last sector, halves, every other one, torn,
garbage); so do header copies with more than five changed sectors. Equal states count once.
"""


def _comparison(results: Sequence[Result]) -> str:
    found = {(r.cell.part, r.cell.name): r for r in _plain(results)}
    chosen = [found[key] for key in COMPARED if key in found]
    if not chosen:
        return ""
    letters = "ABCDEFGHIJ"
    named = {REAL: "luksrotd", STEPS: "luksrotd --engine stepwise", PEER: ""}
    legend = [f"- **{letters[n]}** {f'{named[r.cell.part]} {r.cell.name}'.strip()}" for n, r in enumerate(chosen)]
    rows = [
        ["writes", *(f"{r.writes}" for r in chosen)],
        ["bytes written", *(f"{r.bytes:,}" for r in chosen)],
        ["flushes", *(f"{r.flushes}" for r in chosen)],
        ["crash states", *(f"{r.states:,}" for r in chosen)],
    ]
    rows += [[kind, *(str(r.before.get(kind, 0)) for r in chosen)] for kind in KINDS]
    rows += [[f"*after reconcile:* {kind}", *(str(r.after.get(kind, 0)) if r.cell.part != PEER else "" for r in chosen)]
             for kind in KINDS]  # fmt: skip
    return f"""## A new backup key in place of the old one, by whom

How many of the crash states have what wrong, after libcryptsetup's own recovery. An image with headers of 16 KiB, a
key of 512 bit, sectors of {chosen[0].cell.geometry.sector} bytes. The writes are those that the kernel was asked for:
our own transaction's are logged at the device that it writes to, all others by strace.

{chr(10).join(legend)}

{_table(["", *letters[: len(chosen)]], rows)}

"Area of a key that never was in force": the new area of a rotation that was cut before its header; its salt was never
written, so it opens nothing ([ADR 7](adr/0007-wipe-and-ghosts.md)). "Two live pairs" of the stepwise engine carry
numbers that say which one is in force.
"""


def _operations(results: Sequence[Result]) -> str:
    rows = []
    for r in _plain(results):
        name = r.cell.name if r.cell.part == REAL else f"{r.cell.name}, stepwise"
        sizes = [str(r.writes), f"{r.bytes:,}", str(r.flushes), f"{r.states:,}", f"{r.reconciled:,}"]
        rows.append([name, *sizes, str(len(r.violations)), _kinds(r.before), _kinds(r.after)])
    header = ["operation", "writes", "bytes", "flushes", "states", "reconciled", "violations",
              "states in which a cut leaves something", "after reconcile"]  # fmt: skip
    return f"""## Each operation, before and after reconcile

On the same geometry, judged by real libcryptsetup: the main passphrase opens; by each valid copy alone, the header says
exactly what it said before the operation or what it says after it, and exactly the credentials of that side open;
libcryptsetup's recovery leads to one of the two, too. Then the real reconcile; the same again; a second reconcile
writes nothing; and every state in which the reconcile can be cut is judged likewise (depth 2; stepwise: depth 1, and it
may be in parts until it is reconciled). "Reconciled": different states; those whose 4 KiB blocks are old, new and torn
alike are reconciled once.

{_table(header, rows)}
"""


REAL_TEXT = """The same verdicts, depth 1, with other sizes of header and key, on images, loop devices and
detached headers, each recorded on the real ports. Crash states; a number of violations stands beside it if there are
any. Larger headers and shorter keys: every verb on some geometries, one verb of each sequence of phases on the others
(headers of 4 MiB only with sectors of 4096 bytes, and only these verbs reconciled);
`python -m tests.crash.table --full` goes through all."""
SIMULATED_TEXT = """Judged by the invariants, each valid header copy alone, and by what it says as above; depth 2 (with
headers of 4 MiB depth 1). Key areas of 4 KiB."""


def _geometries(title: str, text: str, results: Sequence[Result]) -> str:
    lines = [f"## {title}", "", text, ""]
    for metadata in METADATA:
        here = [r for r in results if r.cell.geometry.metadata == metadata]
        columns = sorted({r.cell.geometry for r in here}, key=lambda g: (-g.bits, g.carrier, g.sector))
        if not here:
            continue
        names = [f"{g.carrier} {g.sector}" + (f", {g.bits} bit" if g.bits > 8 else "") for g in columns]
        there = {(r.cell.name, r.cell.geometry): r for r in here}
        rows = [[verb, *(_states(there.get((verb, column))) for column in columns)]
                for verb in VERBS if any((verb, column) in there for column in columns)]  # fmt: skip
        lines += [f"### Headers of {metadata} KiB", "", _table(["operation", *names], rows), ""]
    return "\n".join(lines)


def _mutants(results: Sequence[Result]) -> str:
    missed = [r.cell.name for r in results if r.violations]
    verdict = f"{len(results)}, of which {len(results) - len(missed)} are caught"
    verdict += f", not: {'; '.join(missed)}" if missed else ""
    rows: dict[str, list[str]] = {}
    for r in results:
        verb, _, what = r.cell.name.rpartition(": ")
        rows.setdefault(verb or "operations in two commits", []).append(what)
    return f"""## What must be caught

Wrong protocols, each enumerated and judged like the right ones: {verdict}. Exchanging the two header copies is none of
them: libcryptsetup takes the newer one, whichever it is.

{_table(["operation", "mutants"], [[verb, "; ".join(whats)] for verb, whats in rows.items()])}
"""


def _plain(results: Sequence[Result]) -> list[Result]:
    """Those on the commonest geometry, with the smallest sectors that there are."""
    plain = [r for r in results if (r.cell.geometry.metadata, r.cell.geometry.bits) == (16, 512)]
    plain = [r for r in plain if r.cell.geometry.carrier == "image" and r.cell.part in (REAL, STEPS, PEER)]
    smallest = min((r.cell.geometry.sector for r in plain), default=0)
    return [r for r in plain if r.cell.geometry.sector == smallest]


def _states(result: Result | None) -> str:
    if result is None:
        return ""
    return f"{result.states:,}" + (f", **{len(result.violations)}**" if result.violations else "")


def _kinds(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{kind}: {counts[kind]}" for kind in KINDS if counts.get(kind)) or "nothing"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    ruler = ["---", *("--:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ruler, *rows))
