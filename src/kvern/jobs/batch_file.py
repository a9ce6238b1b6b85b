"""A batch from a file to a file: the work of `kvern batch run`, in a store of its own beside the output.

    IN -> OUT.progress (the store) -> OUT

OUT appears at the end, whole, with one line a line of IN in the order of IN, answered or failed. Until then everything
is in the store, so the same command goes on where it was stopped, however it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvern.errors import BadRequestError, ConfigError
from kvern.jobs.batch import BatchRunner
from kvern.store import Store, batch_rows, batches, files
from kvern.store.batches import Batch
from kvern.wire.batches import ENDPOINTS

OWNER = ""
MODEL = "kvern batch run"
MOST_SHOWN = 20
LINES = 1_000_000
LINE_BYTES = 64 * 2**20


class BatchInputError(BadRequestError):
    """Lines of the input that are no requests, by number."""

    exit_code = 2


def first_line(source: Path) -> tuple[str, str | None]:
    """Endpoint and model of the first request. Raises ConfigError for what cannot be read, BatchInputError."""
    try:
        with source.open("rb") as lines:
            raw = next((line for line in lines if line.strip()), None)
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from error
    if raw is None:
        raise BatchInputError(f"{source} has no line")
    try:
        fields = json.loads(raw.removeprefix(b"\xef\xbb\xbf"))
        endpoint, model = fields["url"], fields["body"].get("model")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        hint = '{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}'
        raise BatchInputError(f"{source}: the first line is no request", hint=f"one is {hint}") from error
    if endpoint not in ENDPOINTS:
        raise BatchInputError(f"{source}: no batches for {endpoint!r}", hint=f"known: {', '.join(ENDPOINTS)}")
    return endpoint, model if isinstance(model, str) else None


def progress_path(target: Path) -> Path:
    """Where the work is kept until the output is whole."""
    return target.with_name(f"{target.name}.progress")


def enter(store: Store, source: Path, target: Path, endpoint: str) -> Batch:
    """The batch of this input and output: the one that was begun, or a new one.

    Raises ConfigError where the store holds a batch of another input.
    """
    digest = _digest(source)
    batch_id = f"batch_{hashlib.sha256(f'{digest} {target.absolute()}'.encode()).hexdigest()[:24]}"
    with store.write() as connection:
        if (batch := batches.get(connection, batch_id)) is not None:
            return batch
        if store.path == progress_path(target).absolute() and batches.page(connection, OWNER, after=None, limit=1):
            hint = f"remove {store.path} to start anew, or name another output"
            raise ConfigError(f"{store.path} is the progress of another input than {source}", hint=hint)
        now = int(time.time())
        file = files.File(files.new_id(), OWNER, "batch", source.name, source.stat().st_size, now)
        files.add(connection, file)
        files.write(connection, file.id, _chunks(source))
        batch = Batch(batch_id, OWNER, MODEL, endpoint, file.id, "", now)
        batches.add(connection, batch)
        return batch


async def work(runner: BatchRunner, store: Store, batch: Batch, show: Callable[[Batch], None]) -> Batch:
    """Take the batch to its end. Raises BatchInputError where the input is no batch."""
    done = await runner.finish(batch.id, show)
    if done.status == "failed":
        wrong = done.errors or []
        shown = [f"line {one['line']}: {one['message']}" if one["line"] else one["message"] for one in wrong]
        more = [f"and {len(shown) - MOST_SHOWN} more"] if len(shown) > MOST_SHOWN else []
        raise BatchInputError("\n".join(["the input is no batch:", *shown[:MOST_SHOWN], *more]))
    return done


def write_output(store: Store, batch: Batch, target: Path) -> None:
    """Write the output whole, then give it its name."""
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("wb") as file:
        for text in _results(store, batch):
            file.write(text + b"\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)


def remove_store(store: Store) -> None:
    """Delete a store that is a file and no longer needed."""
    store.close()
    assert store.path is not None
    for file in store.path.parent.glob(f"{store.path.name}*"):
        if file.suffix == ".lock" or file.name in (store.path.name, f"{store.path.name}-wal", f"{store.path.name}-shm"):
            file.unlink(missing_ok=True)


def _results(store: Store, batch: Batch) -> Iterator[bytes]:
    line = 0
    with store.read() as connection:
        while rows := batch_rows.results(connection, batch.id, ["output", "error"], line):
            yield from (text for _, text in rows)
            line = rows[-1][0]


def _digest(source: Path) -> str:
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _chunks(source: Path) -> Iterator[bytes]:
    with source.open("rb") as file:
        while data := file.read(files.CHUNK_BYTES):
            yield data
