# SPDX-License-Identifier: GPL-2.0-or-later
"""How plots in docs/ look, as SVG: the same bytes for the same numbers (docs/adr/0028-plots-by-matplotlib.md)."""

from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update(
    {
        "svg.hashsalt": "luksrotd",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "figure.constrained_layout.use": True,
    }
)

from matplotlib import pyplot  # noqa: E402 - after the backend is chosen

__all__ = ["COLOURS", "pyplot", "save"]

#: Distinct for those who see no red or green (Okabe and Ito).
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000")


def save(figure: Any, path: Path) -> None:
    """Write it as SVG, and forget it."""
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    # No trailing blanks, which git would complain of.
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
