"""The run: `kvern train` over configs/nano.toml, with the second mixture of configs/nano-anneal.toml behind the first.

    python -m recipes.nano train --out runs/nano                      nano
    python -m recipes.nano train --out runs/dense --dense active      a dense model on the same rows, to compare with

It is the command's own run in all else: the folder, its metrics, checkpoints, and `--resume auto` after a kill.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import tomli_w

from kvern.checkpoint.progress import progress_bar
from kvern.train import config as configs
from kvern.train.checkpoint import Checkpoints
from kvern.train.config import TrainConfig
from kvern.train.flops import peak
from kvern.train.mesh import MeshOptions, Ranks, start
from kvern.train.metrics import Metrics, MetricsFile, ProgressLine, Sink, keep_until
from kvern.train.rows import row_stream
from kvern.train.run_folder import Claim, RunFolder, begin
from kvern.train.stopping import Stopping
from kvern.train.trainer import Outcome, Trainer
from recipes.nano.phases import Phases
from recipes.nano.shapes import Dense, dense

CONFIG, ANNEAL = Path("configs/nano.toml"), Path("configs/nano-anneal.toml")


def train(
    out: Path,
    *,
    like: Dense | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    first: Path = CONFIG,
    anneal: Path = ANNEAL,
) -> Outcome:
    """Train to the end or until a signal; raises KvernError as `kvern train` does."""
    raw = tomllib.loads(first.read_text(encoding="utf-8"))
    later = tomllib.loads(anneal.read_text(encoding="utf-8"))
    if like is not None:
        raw["model"] = dense(raw["model"], like)
    config = _parsed(raw, out, overrides)
    second = _parsed({**raw, "data": later["data"]}, out, overrides)
    folder = RunFolder(out)
    with Stopping() as stopping:
        stopping.at_once()
        with ExitStack() as stack:
            ranks = start(MeshOptions(**config.mesh.model_dump()))
            stack.callback(ranks.close)
            stack.callback(Claim(folder).release)
            begin(folder, config, resume=resume)
            with progress_bar(after=1.0) as progress:
                rows = [row_stream(one, folder, ranks, progress, _say) for one in (config, second)]
            outcome = _run(config, folder, ranks, Phases(rows[0], rows[1], later["from_row"]), stack, stopping)
        _say(str(outcome))
    return outcome


def _run(
    config: TrainConfig, folder: RunFolder, ranks: Ranks, rows: Phases, stack: ExitStack, stopping: Stopping
) -> Outcome:
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep, ranks.is_first)
    stack.callback(checkpoints.close)
    trainer = Trainer(config, rows, ranks, checkpoints)
    if trainer.resume():
        _say(f"going on after step {trainer.progress.step}, {trainer.progress.tokens:,} tokens")
    limit = peak(ranks.device, config.precision.activation_dtype)
    keep_until(folder.metrics, trainer.progress.step)
    sinks: list[Sink] = [MetricsFile(folder.metrics), ProgressLine(config.steps, config.tokens, limit.source)]
    with Metrics(sinks) as metrics:
        return trainer.run(metrics, limit, stopping)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parsed(raw: dict[str, Any], out: Path, overrides: Sequence[str]) -> TrainConfig:
    """Through a file, so that overrides mean what they mean to `kvern train`."""
    path = out.with_name(f".{out.name}.toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(raw), encoding="utf-8")
    try:
        return configs.load(path, overrides)
    finally:
        path.unlink()
