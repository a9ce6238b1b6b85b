"""A run's folder: config.toml as resolved, metrics.jsonl, checkpoints/, data/ (token files), tokenizer/, errors.log.

A folder belongs to one run: it is begun empty, and goes on with the same configuration only.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from kvern.checkpoint.save import write_file
from kvern.errors import ConfigError, KvernError
from kvern.train.checkpoint import complete
from kvern.train.config import TrainConfig, load

OURS_BEFORE_CONFIG = (".lock", "config.toml.part")
"""What a run that was killed while it wrote config.toml leaves."""


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration, every default written out."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def data(self) -> Path:
        """Token files."""
        return self.path / "data"

    @property
    def tokenizer(self) -> Path:
        """What text was read with: tokenizer.json and tokenizer_config.json."""
        return self.path / "tokenizer"

    @property
    def errors(self) -> Path:
        """Why the run stopped, a line each time."""
        return self.path / "errors.log"

    def is_begun(self) -> bool:
        """Whether a step of a run was made here. A run that failed before its first step may be begun anew."""
        trained = self.metrics.exists() and self.metrics.stat().st_size > 0
        return self.config.exists() and (trained or bool(complete(self.checkpoints)))


class Claim:
    """The right to write into a run's folder: one process at a time has it, and loses it when it ends in any way."""

    def __init__(self, folder: RunFolder) -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(folder.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise KvernError(f"another process trains in {folder.path}") from error

    def release(self) -> None:
        """Let others write."""
        os.close(self._descriptor)


def begin(folder: RunFolder, config: TrainConfig, resume: bool) -> None:
    """Make the folder this run's. ConfigError where it holds another run, or anything else."""
    if folder.is_begun():
        if not resume:
            raise ConfigError(
                f"{folder.path} holds a run already", hint="--resume auto goes on with it; or name another --out"
            )
        check_same(load(folder.config), config, folder.path)
    elif not folder.config.exists() and (
        foreign := [entry.name for entry in sorted(folder.path.iterdir()) if entry.name not in OURS_BEFORE_CONFIG]
    ):
        raise ConfigError(f"{folder.path} is not empty: it holds {foreign[0]}", hint="name a new folder as --out")
    write_file(folder.config, config.toml().encode())


def check_same(before: TrainConfig, now: TrainConfig, where: Path) -> None:
    """ConfigError that names the keys which a run must not change and which differ."""
    if changed := before.changed(now):
        old, new = before.flat(), now.flat()
        shown = "; ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in changed[:5])
        raise ConfigError(
            f"{where} was begun with another configuration: {shown}",
            hint="only steps, tokens, batch.micro_batch, recompute, mesh, checkpoint and metrics may change",
            param=changed[0],
        )
