"""Checkpoints of a run, in the format of torch.distributed.checkpoint: asynchronous, atomic, the newest few kept.

    checkpoints/step-00000123/    __0_0.distcp ... (one file a rank), .metadata, progress.json
    checkpoints/step-00000124.part/    one that is being written, or was when the process died: never read, removed

The state is copied in memory, then written by a thread of its own while training goes on; the folder gets its name when
every rank's file is on the disk. It holds the float32 parameters under the checkpoint's names, the moments, the gates'
biases in float32, the state of torch's generator, and in progress.json what a person may want to read: step, tokens,
consumed sequences, and the fingerprints of configuration and data. Any number of ranks reads what any other
wrote. What it gives up: memory for one copy of the state while it is written.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from kvern.checkpoint.save import rename, write_file
from kvern.errors import CheckpointError
from kvern.train.optim import AdamW

PROGRESS = "progress.json"
COMPLETE = re.compile(r"step-(\d{8,})")
PART = ".part"
ALONE = "torch.distributed is disabled"
"""What torch warns of when one process saves for itself, as it should."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands. config, data: fingerprints of its configuration and of its rows."""

    step: int = 0
    tokens: int = 0
    consumed: int = 0
    config: str = ""
    data: str = ""


class Checkpoints:
    """The folder of a run's checkpoints. Every rank makes one and calls the same methods in the same order."""

    def __init__(self, folder: Path, keep: int, is_first: bool = True) -> None:
        self.folder, self._keep, self._is_first = folder, keep, is_first
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        warnings.filterwarnings("ignore", ALONE, UserWarning)
        if is_first:
            folder.mkdir(parents=True, exist_ok=True)
            clean(folder)

    def save(self, state: dict[str, Any], progress: Progress) -> None:
        """Copy `state` and begin to write it; waits for the one before. Raises CheckpointError if that one failed."""
        self.wait()
        staged = self._stager.stage(state)
        assert isinstance(staged, dict)
        self._pending = self._thread.submit(self._write, staged, progress)

    def wait(self) -> None:
        """Until nothing is being written. Raises CheckpointError where writing failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:  # torch wraps what happened on each rank in a type of its own
            raise CheckpointError(
                f"cannot be written: {_reason(error)}", file=self.folder, hint="complete ones stay as they are"
            ) from error

    def close(self) -> None:
        """Finish what is being written."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._stager.close()

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Fill `state` in place. Raises CheckpointError for a checkpoint that is damaged or of another model."""
        try:
            load(state, checkpoint_id=path, process_group=self._group)
        except Exception as error:  # torch's own type, pickle's, the system's
            raise CheckpointError(
                f"cannot be read: {_reason(error)}", file=path, hint="remove it, and the one before is taken"
            ) from error

    def _write(self, staged: dict[str, Any], progress: Progress) -> None:
        final = self.folder / f"step-{progress.step:08}"
        part = final.with_name(final.name + PART)
        save(staged, checkpoint_id=part, process_group=self._group)
        if self._is_first:
            write_file(part / PROGRESS, (json.dumps(asdict(progress), indent=1) + "\n").encode())
            rename(part, final)
            for old in complete(self.folder)[: -self._keep]:
                shutil.rmtree(old)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, the oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), entry) for entry in folder.iterdir() if (match := COMPLETE.fullmatch(entry.name))]
    return [entry for _, entry in sorted(found)]


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    return next(reversed(complete(folder)), None)


def clean(folder: Path) -> None:
    """Remove what was begun and never completed."""
    for entry in folder.iterdir():
        if entry.name.endswith(PART):
            shutil.rmtree(entry)


def read_progress(path: Path) -> Progress:
    """Where the run stood at checkpoint `path`. Raises CheckpointError."""
    file = path / PROGRESS
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return Progress(**{field.name: raw[field.name] for field in fields(Progress)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot be read ({error})", file=file) from error


def training_state(model: nn.Module, optimizer: AdamW) -> dict[str, Any]:
    """Everything that training changes, by name; tensors are the real ones, to be saved or to be loaded into.

    Moments that no step has made yet are made, as zeros.
    """
    state: dict[str, Any] = {"generator": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter.detach()
        if parameter.requires_grad:
            moments = optimizer.moments_of(parameter)
            state |= {f"optimizer.{moment}.{name}": moments[moment] for moment in optimizer.moment_names(parameter)}
    state |= {f"model.{name}": buffer for name, buffer in model.named_buffers()}
    return state


def set_steps(optimizer: Optimizer, step: int) -> None:
    """Tell the optimizer how many steps its moments have seen."""
    for moments in optimizer.state.values():
        moments["step"] = step


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line: torch collects a traceback of every rank."""
    failures = getattr(error, "failures", None)
    inner = next(iter(failures.values()))[0] if failures else error
    text = " ".join(str(inner).split())
    return f"{type(inner).__name__}: {text[:300]}"
