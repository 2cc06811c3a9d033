# SPDX-License-Identifier: GPL-2.0-or-later
"""What the demo shows: with rich on a terminal, plain lines anywhere else."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper

from rich.console import Console
from rich.table import Table
from rich.text import Text


class Broken(Exception):
    """Something is not as promised; the message says what."""


def check(fact: object, otherwise: str) -> None:
    """Raise ``Broken`` with the reason ``otherwise`` unless ``fact`` holds."""
    if not fact:
        raise Broken(otherwise)


class Screen:
    """Prints sections, steps, commands and tables."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that has no tick gets a question mark
        self._rich = sys.stdout.isatty()
        self._console = Console(highlight=False, markup=False, emoji=False)

    def section(self, title: str) -> None:
        """Begin a part."""
        self._console.print()
        if self._rich:
            self._console.rule(Text(title, "bold"), align="left")
        else:
            self._line(f"== {title} ==")

    def say(self, text: str) -> None:
        """A sentence to the reader."""
        self._line(text, "italic")

    def command(self, command: Sequence[str]) -> None:
        """A command as one would type it."""
        self._line(f"  $ {shlex.join(command)}", "cyan")

    def output(self, text: str) -> None:
        """What it printed."""
        for line in text.splitlines():
            self._line(f"    {line}", "dim")

    def table(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows under headings."""
        if not self._rich:
            self._plain_table(title, [headings, *rows])
            return
        table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for heading in headings:
            table.add_column(heading, header_style="bold", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self._console.print(table)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Something that is done, and checked, within: a tick if it is as promised, else a cross."""
        try:
            yield
        except Exception:
            self._line(f"{'✗' if self._rich else 'FAILED'} {text}", "bold red")
            raise
        self._line(f"{'✓' if self._rich else 'ok'} {text}", "green")

    def end(self, text: str, *, good: bool) -> None:
        """The last line."""
        self._console.print()
        self._line(text, "bold green" if good else "bold red")

    def _plain_table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        self._line(f"{title}:")
        for row in rows:
            self._line("  " + "   ".join(map(str.ljust, row, widths)).rstrip())

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style), soft_wrap=True)
