# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports on standard output: one JSON document, plain text, or with rich on a terminal."""

import json
import sys
from collections.abc import Iterator
from typing import TextIO

from luksrotd.ctl.report import Report, Table


def render(report: Report, *, as_json: bool) -> None:
    """Print the report and flush; raises ``OSError`` where it cannot be written."""
    stream = sys.stderr if report.to_stderr and not as_json else sys.stdout
    if as_json:
        print(json.dumps(report.document, indent=2), file=stream, flush=True)
    elif stream.isatty():
        _render_rich(report, stream)
    else:
        for line in _plain(report):
            print(line, file=stream)
        stream.flush()


def printable(text: str) -> str:
    """``text`` with all that a terminal could take for a command escaped: labels and data are whatever is on a disk."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _plain(report: Report) -> Iterator[str]:
    for part in report.text:
        if isinstance(part, str):
            yield printable(part)
            continue
        rows = [[printable(cell) for cell in row] for row in (part.headings, *part.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _render_rich(report: Report, stream: TextIO) -> None:
    from rich.console import Console  # noqa: PLC0415 - only where there is a terminal: a script need not wait for it
    from rich.table import Table as RichTable  # noqa: PLC0415 - slow to import, for a terminal only
    from rich.text import Text  # noqa: PLC0415 - as above

    console = Console(file=stream, highlight=False)
    for part in report.text:
        if isinstance(part, Table):
            table = RichTable(box=None, header_style="bold", pad_edge=False)
            for heading in part.headings:
                table.add_column(heading, overflow="fold")
            for row in part.rows:
                table.add_row(*(Text(printable(cell)) for cell in row))
            console.print(table)
        else:
            console.print(Text(printable(part), style="bold red" if report.status else ""), soft_wrap=True)
