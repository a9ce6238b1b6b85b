"""Kvern and other engines on the same weights and the same machine, in alternating runs, as one table.

    python -m bench.peers [--model base|coder-0.5b|coder-1.5b] [--full] [--json [FILE]] [--chart FILE.png]

The first run installs and builds the peers and makes the checkpoints, in a folder of its own (about 25 GB with
everything); later runs find them. docs/peers.md says what is compared and how fair it is. Measure on a machine that
does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.peers import chart, report
from bench.peers.cases import ENGINES, IK, LLAMA, TRANSFORMERS, Case, chosen
from bench.peers.checkpoints import Checkpoints
from bench.peers.engines import Engines
from bench.peers.runner import Log, measure
from bench.peers.setup import Setup

from kvern.bench import charts
from kvern.bench.engine import read_gb_s
from kvern.bench.tables import plain
from kvern.checkpoint.local import cache_folder
from kvern.ops import library
from kvern.plan.hardware import machine

MODELS = ("base", "coder-0.5b", "coder-1.5b")
DEFAULT = (LLAMA, IK, TRANSFORMERS)
BUSY = 1.0
"""Load of the machine from which its figures are marked."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the log lacks, then print."""
    args = _arguments(argv)
    if args.chart is not None:
        charts.check(args.chart)
    setup = Setup(args.work.expanduser(), _say)
    log = Log.open(args.work.expanduser() / "results" / f"{args.model}.jsonl", resume=args.resume or args.report)
    engines = Engines(
        setup, Checkpoints(setup, args.model), allow_avx2=args.avx2 or args.full, ik_source=args.ik == "source"
    )
    title, read = _machine(args.model)
    if not args.report:
        measure(args.cases, args.engines, engines, log, args.rounds, _say)
    found = report.rows(args.cases, args.engines, log, read)
    _print(args, title, found)
    if args.chart is not None:
        chart.draw(args.cases, args.engines, found, title, args.chart)
    return 0


def _print(args: argparse.Namespace, title: str, found: list[report.Row]) -> None:
    rows = json.dumps([asdict(row) for row in found], indent=1)
    if args.json == "-":
        print(rows)
        return
    print(title)
    print("\n".join(plain(report.table(args.cases, args.engines, found))))
    for note in report.notes(args.cases, found):
        print(note)
    if args.json is not None:
        Path(args.json).write_text(rows + "\n")


def _machine(model: str) -> tuple[str, float]:
    """The heading, and what a plain read of memory gives now."""
    load, read = os.getloadavg()[0], read_gb_s()
    mark = f", DISTURBED: load {load:.1f} at the start" if load > BUSY else ""
    kernels = f"kernels {library.isa() or 'none'}, {library.threads()} threads"
    return f"{model}, {machine().cpu}, {kernels}, read {read:.1f} GB/s{mark}", read


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="base")
    parser.add_argument(
        "--engines", type=_engines, default=DEFAULT, metavar="A,..", help=f"of {', '.join(ENGINES)}; none: Kvern alone"
    )
    parser.add_argument("--cases", metavar="A,..", help="by name (default: all but the long ones)")
    parser.add_argument("--full", action="store_true", help="the long cases and the AVX2 build of llama.cpp as well")
    parser.add_argument("--avx2", action="store_true", help="build llama.cpp for AVX2 as well")
    parser.add_argument(
        "--ik", choices=("source", "wheel"), default="source", help="ik_llama.cpp for this CPU, or its AVX2 wheel"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="undisturbed rounds of a case (5)")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="rows as JSON, to a file or alone to stdout"
    )
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw a chart (pip install 'kvern[bench]')")
    parser.add_argument(
        "--work", type=Path, default=cache_folder() / "peers", metavar="DIR", help="everything goes here"
    )
    parser.add_argument("--resume", action="store_true", help="keep the samples of the last run and go on")
    parser.add_argument("--report", action="store_true", help="measure nothing, print the last run")
    args = parser.parse_args(argv)
    try:
        args.cases = _cases(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _cases(args: argparse.Namespace) -> list[Case]:
    return chosen(args.model, args.cases.split(",") if args.cases else None, args.full)


def _engines(text: str) -> tuple[str, ...]:
    names = tuple(text.split(",")) if text != "none" else ()
    unknown = set(names) - set(ENGINES)
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no engine is called {', '.join(sorted(unknown))}; known: {', '.join(ENGINES)}"
        )
    return names


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
