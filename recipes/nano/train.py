"""The run: `kvern train` over configs/nano.toml, with the second mixture of configs/nano-anneal.toml behind the first.

    python -m recipes.nano train --out runs/nano                      nano
    python -m recipes.nano train --out runs/dense --dense active      a dense model on the same rows, to compare with
    torchrun --nproc-per-node 2 -m recipes.nano train --out runs/nano      in two processes

It is the command's own run in all else: the folder, its metrics, checkpoints, and `--resume auto` after a kill.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from kvern.data.build import Progress
from kvern.train import config as configs
from kvern.train.config import TrainConfig
from kvern.train.mesh import Ranks
from kvern.train.rows import row_stream
from kvern.train.run import Say, run
from kvern.train.run_folder import RunFolder
from kvern.train.trainer import Outcome
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
    second = _parsed({**raw, "data": later["data"]}, out, overrides)

    def both(
        config: TrainConfig, folder: RunFolder, ranks: Ranks, progress: Progress | None, say: Say | None
    ) -> Phases:
        rows = [row_stream(one, folder, ranks, progress, say) for one in (config, second)]
        return Phases(rows[0], rows[1], later["from_row"])

    return run(_parsed(raw, out, overrides), out, resume=resume, make_rows=both)


def _parsed(raw: dict[str, Any], out: Path, overrides: Sequence[str]) -> TrainConfig:
    """Through a file, so that overrides mean what they mean to `kvern train`."""
    path = out.with_name(f".{out.name}.{os.getpid()}.toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(raw), encoding="utf-8")
    try:
        return configs.load(path, overrides)
    finally:
        path.unlink()
