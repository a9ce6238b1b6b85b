"""`kvern train CONFIG --out DIR`: a training run, alone or under torchrun, that any kill leaves able to go on."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from kvern.errors import KvernError

if TYPE_CHECKING:
    from kvern.train.config import TrainConfig
    from kvern.train.mesh import Ranks
    from kvern.train.run_folder import RunFolder
    from kvern.train.stopping import Stopping
    from kvern.train.trainer import Outcome

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
    from kvern.train.mesh import MeshOptions, start
    from kvern.train.run_folder import Claim, RunFolder, begin
    from kvern.train.stopping import Stopping

    config, folder = load(args.config, args.overrides), RunFolder(args.out)
    with Stopping() as stopping:
        with ExitStack() as stack:
            ranks = start(MeshOptions(**config.mesh.model_dump()))
            stack.callback(ranks.close)
            if ranks.world == 1:
                stopping.at_once()
            _use_threads(args.threads, ranks)
            if ranks.is_first:
                stack.callback(Claim(folder).release)
                begin(folder, config, resume=args.resume is not None)
            ranks.barrier()
            outcome = _train(config, folder, ranks, stack, stopping)
        _say(ranks, str(outcome))
    if ranks.world > 1:
        _leave(outcome.exit_code)
    return outcome.exit_code


def _train(config: TrainConfig, folder: RunFolder, ranks: Ranks, stack: ExitStack, stopping: Stopping) -> Outcome:
    from kvern.checkpoint.progress import progress_bar
    from kvern.train.checkpoint import Checkpoints
    from kvern.train.flops import peak
    from kvern.train.metrics import Metrics, MetricsFile, ProgressLine, Sink, keep_until, tensorboard
    from kvern.train.rows import row_stream
    from kvern.train.trainer import Trainer

    with progress_bar(after=1.0) as progress:
        rows = row_stream(config, folder, ranks, progress, partial(_say, ranks))
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep, ranks.is_first)
    stack.callback(checkpoints.close)
    trainer = Trainer(config, rows, ranks, checkpoints)
    if trainer.resume():
        _say(ranks, f"going on after step {trainer.progress.step}, {trainer.progress.tokens:,} tokens")
    limit = peak(ranks.device, config.precision.activation_dtype)
    sinks: list[Sink] = []
    if ranks.is_first:
        keep_until(folder.metrics, trainer.progress.step)
        sinks = [MetricsFile(folder.metrics), *tensorboard(folder.path / "tensorboard", config.metrics.tensorboard)]
        sinks.append(ProgressLine(config.steps, config.tokens, limit.source))
    with Metrics(sinks) as metrics:
        try:
            return trainer.run(metrics, limit, stopping)
        except KvernError as error:
            if ranks.is_first:
                with folder.errors.open("a", encoding="utf-8") as log:
                    log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {error.message}\n")
            raise


def _leave(code: int) -> NoReturn:
    """End the process past torch's exit, which now and then aborts one that has talked over gloo, when all is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _use_threads(count: int | None, ranks: Ranks) -> None:
    import torch

    from kvern.errors import ConfigError
    from kvern.plan.hardware import default_threads

    if count is not None and not 1 <= count <= 1024:
        raise ConfigError(f"{count} threads are not possible", hint="give a number from 1 to 1024", param="threads")
    torch.set_num_threads(count or min(torch.get_num_threads(), default_threads()))


def _say(ranks: Ranks, line: str) -> None:
    if ranks.is_first:
        print(line, file=sys.stderr, flush=True)
