"""From a run's folder, or one of its checkpoints, to an export: which state, which model, which files beside it."""

from __future__ import annotations

from pathlib import Path

from kvern.checkpoint.convert import carried_files
from kvern.checkpoint.save import PlannedTensor, Progress
from kvern.errors import CheckpointError, ConfigError
from kvern.train.checkpoint import COMPLETE, latest
from kvern.train.config import load
from kvern.train.export import ExportOptions, export
from kvern.train.masters import INDEX, SavedMasters
from kvern.train.run_folder import RunFolder


def export_run(
    source: Path, dst: Path, options: ExportOptions, *, progress: Progress | None = None, force: bool = False
) -> list[PlannedTensor]:
    """Write the newest checkpoint of the run `source`, or the checkpoint `source`, into the folder `dst`.

    The tokenizer and chat template of the run go along, and what else lies beside the checkpoint that it began from.
    """
    checkpoint = find_checkpoint(source)
    run = RunFolder(checkpoint.resolve().parent.parent)
    if dst.resolve() == run.path or run.path in dst.resolve().parents:
        raise ConfigError(f"{dst} lies in the folder of the run", hint="choose a folder beside it", param="out")
    config = load(run.config)
    masters = SavedMasters(checkpoint)
    beside = {} if config.folder is None else carried_files(config.folder)
    return export(
        config.architecture(),
        masters,
        dst,
        options,
        source=masters.fingerprint(),
        files=beside | carried_files(run.tokenizer),
        start=config.folder,
        progress=progress,
        force=force,
    )


def find_checkpoint(source: Path) -> Path:
    """A run's newest complete checkpoint, or `source` where it is one. CheckpointError where there is none."""
    if (source / INDEX).is_file():
        if (
            not COMPLETE.fullmatch(source.resolve().name)
            or not RunFolder(source.resolve().parent.parent).config.is_file()
        ):
            raise CheckpointError("this checkpoint does not lie in the folder of its run", file=source)
        return source
    run = RunFolder(source)
    if not run.config.is_file():
        raise CheckpointError("neither the folder of a run nor a checkpoint of one", file=source)
    newest = latest(run.checkpoints)
    if newest is None:
        raise CheckpointError("the run has no complete checkpoint yet", file=source)
    return newest
