"""`kvern train plot RUN ...`: a run's curves as a PNG, several runs one over the other."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "draw loss, load balance and throughput of training runs"
EXAMPLES = """\
kvern train plot runs/a                          writes runs/a/plot.png
kvern train plot runs/bf16 runs/fp8 --png fp8.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folder of a run")
    parser.add_argument("--png", metavar="FILE", type=Path, help="what to write (default: plot.png in the first RUN)")


def run(args: argparse.Namespace) -> int:
    """Draw, and say where."""
    from kvern.train.plot import plot

    png = args.png or args.runs[0] / "plot.png"
    plot(args.runs, png)
    print(png)
    return 0
