# SPDX-License-Identifier: GPL-2.0-or-later
"""What limits a figure of docs/benchmarks, where it is not what was to be reached, and how that is known."""

from collections.abc import Mapping
from typing import Final

#: By number of the measurement.
REMARKS: Final[Mapping[int, str]] = {}
