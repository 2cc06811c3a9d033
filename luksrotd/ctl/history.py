# SPDX-License-Identifier: GPL-2.0-or-later
"""What has been done to the volumes of this machine."""

import argparse
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from luksrotd.ctl.arguments import DEVICE_HELP, Verbs
from luksrotd.ctl.backend import call
from luksrotd.ctl.exits import Exit
from luksrotd.ctl.model import Backend, Device
from luksrotd.ctl.report import Report, Table
from luksrotd.ctl.request import seconds
from luksrotd.errors import InvalidRequest

_MICROSECONDS: Final = 1_000_000
_LIMIT: Final = 100
_MOST: Final = 500


def add(verbs: Verbs) -> None:
    """The verb."""
    verbs.group("the record")
    history = verbs.add(
        "history",
        _history,
        "tell what has been done to the volumes, by whom, and what came of it",
        "luksrotctl history /dev/sda2 --since 30d",
        writes=False,
        check=_check,
        bus=True,
    )
    history.add_argument("device", metavar="DEVICE", nargs="?", help=f"only of this one: {DEVICE_HELP}")
    history.add_argument("--since", metavar="TIME", help="only what is not older than this: 45m, 12h, 30d or 6w")
    limit = f"only the newest N records (default: {_LIMIT}, at most {_MOST})"
    history.add_argument("--limit", type=int, metavar="N", default=_LIMIT, help=limit)


def _check(options: argparse.Namespace) -> None:
    if not 0 < options.limit <= _MOST:
        raise InvalidRequest(f"cannot use --limit {options.limit}: it takes a number from 1 to {_MOST}")
    if options.since is not None:
        seconds(options.since, "--since")


def _history(options: argparse.Namespace) -> Report:
    since = 0
    if options.since is not None:
        since = int((time.time() - seconds(options.since, "--since")) * _MICROSECONDS)
    device = None if options.device is None else Device(options.device)

    async def work(backend: Backend) -> Report:
        found = await backend.history(device, since, options.limit)
        rows = [_row(entry) for entry in found]
        text = [Table(("TIME (UTC)", "VOLUME", "KEY", "WHAT", "BY", "OUTCOME"), rows)] if rows else ["nothing"]
        return Report(Exit.DONE, {"records": [dict(entry) for entry in found]}, text, read_only=True)

    return call(options, work)


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    at = datetime.fromtimestamp(int(entry["time"]) / _MICROSECONDS, UTC).strftime("%Y-%m-%d %H:%M:%S")
    by = " ".join(str(entry[field]) for field in ("uid", "client", "unit") if entry.get(field, "") != "")
    told = (str(entry.get(field) or "-") for field in ("uuid", "key", "message"))
    return (at, *told, by or "-", str(entry.get("outcome") or "-"))
