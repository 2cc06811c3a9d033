# SPDX-License-Identifier: GPL-2.0-or-later
"""A fuzzing campaign: ``python -m tests.fuzz [--seconds N | --runs N] [TARGET...]``, one target after the other.

By time, the corpus in build/fuzz is used and grows; by runs, everything is chosen by a fixed seed.  An input that fails
is left in build/fuzz.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TARGETS = ("headers", "metadata", "tokens", "plans", "backups", "wire")
BUILD = Path(__file__).parents[2] / "build" / "fuzz"
#: What one input may take, in seconds and MiB, before it is called a hang or a leak.
LIMITS = ("-timeout=120", "-rss_limit_mb=1024", "-max_len=4096")


def main() -> int:
    """Run the targets that are asked for; 1 if an input failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--seconds", type=int, default=300, help="for each target")
    amount.add_argument("--runs", type=int, help="of each target, always the same ones")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    options = parser.parse_args()
    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no such target: {', '.join(unknown)}")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a text file
    failed = [target for target in options.targets or TARGETS if not fuzz(target, options)]
    return 1 if failed else 0


def fuzz(target: str, options: argparse.Namespace) -> bool:
    """Whether no input of the target failed."""
    with tempfile.TemporaryDirectory() as fresh:
        corpus = BUILD / target if options.runs is None else Path(fresh)
        for folder in (BUILD, corpus):
            folder.mkdir(parents=True, exist_ok=True)
        bound = [f"-max_total_time={options.seconds}"] if options.runs is None else [f"-runs={options.runs}", "-seed=1"]
        command = [sys.executable, "-m", f"tests.fuzz.{target}"]
        shown = (*bound, *LIMITS, "-print_final_stats=1", f"-artifact_prefix={BUILD}/{target}-")
        done = subprocess.run(
            [*command, *shown, str(corpus)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
    output = done.stdout.decode(errors="replace")
    if done.returncode:
        sys.stdout.write(f"{output[-10000:]}\n")
        sys.stdout.write(f"{target}: FAILED; once more: python -m tests.fuzz.{target} {BUILD}/{target}-…\n")
    else:
        sys.stdout.write(f"{target:9} {summary(output)}\n")
    return done.returncode == 0


def summary(output: str) -> str:
    """What libFuzzer says of a run that found nothing."""
    stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", output))
    reached = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", output)[-1]
    return (
        f"{stats['number_of_executed_units']:>8} runs, {stats['average_exec_per_sec']:>5} a second; "
        f"{reached[0]} places and {reached[1]} features reached, {reached[2]} inputs kept; {stats['peak_rss_mb']} MiB"
    )


if __name__ == "__main__":
    sys.exit(main())
