"""One run from its configuration to its end: ranks, the folder, rows, the trainer, and what is written meanwhile.

It is all that `kvern train` does behind its command line, for whoever trains from Python. Under torchrun every rank
calls it, with the same arguments; the first one writes what is written once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import torch

from kvern.checkpoint.progress import progress_bar
from kvern.data.build import Progress
from kvern.errors import ConfigError, KvernError
from kvern.plan.hardware import default_threads
from kvern.train.checkpoint import Checkpoints
from kvern.train.config import TrainConfig
from kvern.train.mesh import MeshOptions, Ranks, start
from kvern.train.metrics import Metrics, MetricsFile, ProgressLine, Sink, keep_until, tensorboard
from kvern.train.peak import peak
from kvern.train.rows import row_stream
from kvern.train.run_folder import Claim, RunFolder, begin
from kvern.train.stopping import Stopping
from kvern.train.trainer import Outcome, Rows, Trainer

Say = Callable[[str], None]
MakeRows = Callable[[TrainConfig, RunFolder, Ranks, Progress | None, Say | None], Rows]


def run(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    threads: int | None = None,
    make_rows: MakeRows = row_stream,
) -> Outcome:
    """Train in the folder `out` to the end or until a signal; raises KvernError as `kvern train` prints it.

    resume: go on from the newest checkpoint there. threads: of this process; every usable core where None.
    make_rows: what to train on, if not what `config.data` names.
    """
    folder = RunFolder(out)
    with Stopping() as stopping:
        with ExitStack() as stack:
            ranks = start(MeshOptions(**config.mesh.model_dump()))
            stack.callback(ranks.close)
            if ranks.world == 1:
                stopping.at_once()
            _use_threads(threads)
            if ranks.is_first:
                stack.callback(Claim(folder).release)
                begin(folder, config, resume=resume)
            ranks.barrier()
            outcome = _train(config, folder, ranks, make_rows, stack, stopping)
        _voice(ranks)(str(outcome))
    if ranks.world > 1:
        _leave(outcome.exit_code)
    return outcome


def _train(
    config: TrainConfig, folder: RunFolder, ranks: Ranks, make_rows: MakeRows, stack: ExitStack, stopping: Stopping
) -> Outcome:
    say = _voice(ranks)
    with progress_bar(after=1.0) as progress:
        rows = make_rows(config, folder, ranks, progress, say)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep, ranks.is_first)
    stack.callback(checkpoints.close)
    trainer = Trainer(config, rows, ranks, checkpoints)
    if trainer.resume():
        say(f"going on after step {trainer.progress.step}, {trainer.progress.tokens:,} tokens")
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


def _use_threads(count: int | None) -> None:
    if count is not None and not 1 <= count <= 1024:
        raise ConfigError(f"{count} threads are not possible", hint="give a number from 1 to 1024", param="threads")
    torch.set_num_threads(count or min(torch.get_num_threads(), default_threads()))


def _voice(ranks: Ranks) -> Say:
    """Writes lines on stderr, on the first rank only."""

    def say(line: str) -> None:
        if ranks.is_first:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    return say
