"""`kvern train export RUN OUT`: what a run trained, as a checkpoint in the official layout."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

HELP = "write what a run trained as a checkpoint that `kvern serve` and others read"
EXAMPLES = """\
kvern train export runs/a my-model --dtype bf16
kvern train export runs/a my-model-fp8 --dtype fp8 --ue8m0
kvern train export runs/a/checkpoints/step-00000100 earlier --dtype f32
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run (its newest checkpoint counts), or a checkpoint")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; it resumes if interrupted")
    parser.add_argument("--dtype", choices=["fp8", "bf16", "f32"], required=True, help="storage of the weights")
    parser.add_argument("--ue8m0", action="store_true", help="FP8 scales are powers of two, as in DeepSeek-V3.1")
    parser.add_argument("--head-fp8", action="store_true", help="the head in FP8 too (the official layout keeps BF16)")
    parser.add_argument("--force", action="store_true", help="start again instead of resuming in OUT")


def run(args: argparse.Namespace) -> int:
    """Export, and print what was written. Returns the exit code."""
    from kvern.checkpoint.progress import progress_bar, readable_bytes
    from kvern.checkpoint.save import total_size
    from kvern.train.export import ExportOptions
    from kvern.train.export_run import export_run

    options, started = ExportOptions(args.dtype, args.ue8m0, args.head_fp8), time.monotonic()
    with progress_bar() as progress:
        tensors = export_run(args.run, args.out, options, progress=progress, force=args.force)
    size, seconds = readable_bytes(total_size(tensors)), time.monotonic() - started
    print(f"{args.out}: {len(tensors):,} tensors, {size}, {seconds:.1f} s")
    return 0
