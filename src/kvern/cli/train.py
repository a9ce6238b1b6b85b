"""`kvern train CONFIG --out DIR`: a training run, alone or under torchrun, that any kill leaves able to go on."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "train a model of the DeepSeek-V3 architecture: `kvern train plot` draws its curves"
EXAMPLES = """\
kvern train configs/nano-smoke.toml --out runs/smoke
kvern train my.toml --out runs/a --set batch.rows=64 --set learning_rate.peak=1e-3
kvern train my.toml --out runs/a --resume auto          (goes on where it stopped, in any way)
torchrun --nproc-per-node 8 -m kvern train my.toml --out runs/b
kvern train plot runs/a runs/b --png both.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="TOML file; see docs/training.md")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change a value of the file, as batch.rows=64; may be repeated",
    )
    parser.add_argument(
        "--resume", choices=["auto"], help="auto: go on from the newest checkpoint in DIR, or begin where there is none"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: every usable core)")


def run(args: argparse.Namespace) -> int:
    """Train. 0: to the end; 128 and the signal's number: stopped by one, with a checkpoint."""
    from kvern.train.config import load
    from kvern.train.run import run as train

    config = load(args.config, args.overrides)
    return train(config, args.out, resume=args.resume is not None, threads=args.threads).exit_code
