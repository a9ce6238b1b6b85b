"""Writes a checkpoint folder shard by shard: atomic, resumable, in the memory of one tensor.

Each shard is streamed into `NAME.part` (its header is known beforehand), synced and renamed; `config.json` comes last.
So a folder without config.json is incomplete and one with it is whole, whenever the process dies. `conversion.json`
says what is being written from what: the same call continues after the finished shards, another one is refused. Only
files that conversion.json lists are ever replaced or removed. What this gives up: space for both source and destination
is needed, and a shard that was cut short is written again from its start.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from kvern.checkpoint.header import build_header
from kvern.checkpoint.reader import CONFIG_FILE, CONVERSION_FILE, INDEX_FILE, SINGLE_FILE, read_json
from kvern.config import ModelConfig
from kvern.errors import CheckpointError

CHUNK_BYTES = 64 << 20
SHARD_BYTES = 5_000_000_000
BESIDE_A_WEIGHT = (".weight_scale_inv", ".weight_scale", ".weight_shape")
"""Ends of the names that go into the shard of the weight before them."""


class Progress(Protocol):
    """Called with the bytes done, the bytes in all and the tensor being written."""

    def __call__(self, done: int, total: int, tensor: str) -> None: ...


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: `make` returns it (that dtype and shape), or its bytes, when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor | memoryview]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlacedShard:
    """One file: its header, and each tensor with the offset of its data."""

    path: Path
    header: bytes
    tensors: Sequence[tuple[PlannedTensor, int]]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor, _ in self.tensors)

    def is_written(self) -> bool:
        if not self.path.is_file() or self.path.stat().st_size != self.nbytes:
            return False
        with self.path.open("rb") as stream:
            return stream.read(len(self.header)) == self.header


def plan_shards(tensors: Iterable[PlannedTensor], max_bytes: int = SHARD_BYTES) -> list[list[PlannedTensor]]:
    """Split into shards of at most `max_bytes` (a larger tensor gets its own) in order; a weight keeps its scales."""
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        belongs = tensor.name.endswith(BESIDE_A_WEIGHT)
        if filled + tensor.nbytes > max_bytes and filled and not belongs:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def total_size(tensors: Iterable[PlannedTensor]) -> int:
    """Bytes of all tensors: `metadata.total_size` of the index."""
    return sum(tensor.nbytes for tensor in tensors)


def write_checkpoint(
    dst: Path,
    config: ModelConfig,
    shards: Sequence[Sequence[PlannedTensor]],
    *,
    files: Mapping[str, bytes],
    source: str,
    options: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> None:
    """Write `shards`, `files` (tokenizer and the like) and `config` into the folder `dst`; continue if it was begun.

    `source` identifies the weights, `options` how they are converted: both must agree with what was begun, unless
    `force` starts again. Does nothing when `dst` already holds exactly this. Raises CheckpointError when `dst` holds
    anything else, when the disk is full, or when another process is writing there.
    """
    planned = place_shards(dst, shards)
    record = _record(planned, files, source, options or {})
    with _locked(dst):
        _check_owner(dst, record, force)
        if (dst / CONFIG_FILE).is_file():
            return
        todo = [shard for shard in planned if not shard.is_written()]
        _check_space(todo)
        write_file(dst / CONVERSION_FILE, json_bytes(record))
        _write_shards(todo, sum(shard.nbytes for shard in planned), progress)
        for name, content in files.items():
            write_file(dst / name, content)
        if len(planned) > 1:
            write_file(dst / INDEX_FILE, json_bytes(index_of(planned)))
        write_file(dst / CONFIG_FILE, json_bytes(config.to_dict()))


def planned_from_model(model: nn.Module) -> list[PlannedTensor]:
    """Every tensor of the model's state_dict, named and typed as it will be stored; works on the meta device too."""
    return [
        PlannedTensor(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in model.state_dict(keep_vars=True).items()
    ]


def save_model(
    model: nn.Module,
    dst: Path,
    *,
    config: ModelConfig,
    source: str | None = None,
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    force: bool = False,
) -> None:
    """Write a model as it is in memory.

    `source` names this very state (run and step, say), see `write_checkpoint`; None takes the SHA-256 of the weights.
    """
    tensors = planned_from_model(model)
    source = source or _content_hash(tensors)
    shards = plan_shards(tensors, max_shard_bytes)
    write_checkpoint(dst, config, shards, files=files or {}, source=source, progress=progress, force=force)


def _content_hash(tensors: Iterable[PlannedTensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_data(tensor))
    return digest.hexdigest()


def place_shards(dst: Path, shards: Sequence[Sequence[PlannedTensor]]) -> list[PlacedShard]:
    count = len(shards)
    placed = []
    for number, tensors in enumerate(shards, 1):
        name = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:06d}.safetensors"
        header, offsets = build_header([(t.name, t.dtype, t.shape) for t in tensors])
        placed.append(PlacedShard(dst / name, header, list(zip(tensors, offsets, strict=True))))
    return placed


def _record(
    shards: Sequence[PlacedShard], files: Mapping[str, bytes], source: str, options: Mapping[str, str]
) -> dict[str, Any]:
    layout = hashlib.sha256(b"".join(shard.header for shard in shards)).hexdigest()
    written = [shard.path.name for shard in shards] + list(files)
    return {"format": 1, "source": source, "options": dict(options), "layout": layout, "writes": written}


def index_of(shards: Sequence[PlacedShard]) -> dict[str, Any]:
    weight_map = {tensor.name: shard.path.name for shard in shards for tensor, _ in shard.tensors}
    size = total_size(tensor for shard in shards for tensor, _ in shard.tensors)
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@contextmanager
def _locked(dst: Path) -> Iterator[None]:
    """Hold the folder `dst`, made if need be, against other writers."""
    try:
        dst.mkdir(parents=True, exist_ok=True)
        folder = os.open(dst, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _write_error(error, dst) from error
    try:
        _lock(folder, dst)
        yield
    finally:
        os.close(folder)


def _lock(folder: int, dst: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError("another process is writing here", file=dst, hint="wait until it is done") from None


def _check_owner(dst: Path, record: dict[str, Any], force: bool) -> None:
    """Refuse a folder that holds anything but the beginning of this conversion; with `force`, clear what was ours."""
    path = dst / CONVERSION_FILE
    if path.is_file():
        _check_record(dst, read_json(path), record, force)
    elif any(file != _part(path) for file in dst.iterdir()):
        raise CheckpointError(
            "folder is not empty and was not written by Kvern",
            file=dst,
            hint="choose another destination, or empty this folder yourself",
        )


def _check_record(dst: Path, begun: dict[str, Any], record: dict[str, Any], force: bool) -> None:
    if force:
        _remove_written(dst, begun)
        return
    changed = [key for key in ("options", "source", "layout") if begun.get(key) != record[key]]
    if changed:
        raise CheckpointError(
            f"holds a checkpoint {_difference(changed[0], begun, record)}",
            file=dst,
            hint="choose another destination, or start again with --force",
        )


def _difference(key: str, begun: dict[str, Any], record: dict[str, Any]) -> str:
    there, wanted = begun.get("options"), record["options"]
    if key != "options":
        return "of another source" if key == "source" else "to another layout of tensors"
    names = sorted(name for name in wanted if not isinstance(there, dict) or there.get(name) != wanted[name])
    return "with another " + " and ".join(f"{name} than {wanted[name]}" for name in names)


def _remove_written(dst: Path, begun: dict[str, Any]) -> None:
    """Remove what an earlier conversion listed as its own, config.json first: without it nothing looks complete."""
    writes = begun.get("writes", [])
    for name in [CONFIG_FILE, INDEX_FILE, *writes]:
        if isinstance(name, str) and Path(name).name == name:
            (dst / name).unlink(missing_ok=True)
            _part(dst / name).unlink(missing_ok=True)


def _write_shards(todo: Sequence[PlacedShard], total: int, progress: Progress | None) -> None:
    done = total - sum(shard.nbytes for shard in todo)
    for shard in todo:
        try:
            done = _write_shard(shard, done, total, progress)
        except OSError as error:
            raise _write_error(error, shard.path) from error


def _check_space(todo: Sequence[PlacedShard]) -> None:
    needed = sum(shard.nbytes for shard in todo)
    if not needed:
        return
    folder = todo[0].path.parent
    reusable = sum(_part(shard.path).stat().st_size for shard in todo if _part(shard.path).is_file())
    free = shutil.disk_usage(folder).free + reusable
    if needed > free:
        raise CheckpointError(f"disk is too small: {needed:,} bytes are needed, {free:,} are free", file=folder)


def _write_shard(shard: PlacedShard, done: int, total: int, progress: Progress | None) -> int:
    part = _part(shard.path)
    with part.open("wb") as stream:
        stream.write(shard.header)
        done += len(shard.header)
        for tensor, offset in shard.tensors:
            stream.seek(offset)
            for chunk in _chunks(_data(tensor)):
                stream.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total, tensor.name)
        stream.truncate(shard.nbytes)
        stream.flush()
        os.fsync(stream.fileno())
    rename(part, shard.path)
    return done


def _data(planned: PlannedTensor) -> memoryview:
    made = planned.make()
    if isinstance(made, memoryview):
        data = made.cast("B")
    else:
        if made.dtype != planned.dtype or tuple(made.shape) != planned.shape:
            raise CheckpointError(
                f"planned as {planned.dtype} {list(planned.shape)}, made as {made.dtype} {list(made.shape)}",
                tensor=planned.name,
            )
        if made.is_meta:
            raise CheckpointError("tensor is on the meta device and holds no data", tensor=planned.name)
        data = made.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    if len(data) != planned.nbytes:
        raise CheckpointError(f"planned with {planned.nbytes} bytes, made with {len(data)}", tensor=planned.name)
    return data


def _chunks(data: memoryview) -> Iterator[memoryview]:
    return (data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES))


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, and on the disk when this returns. Raises CheckpointError."""
    part = _part(path)
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        rename(part, path)
    except OSError as error:
        raise _write_error(error, path) from error


def rename(part: Path, path: Path) -> None:
    """Give a finished file or folder its name, in place of the file that had it, and wait until the disk knows."""
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_error(error: OSError, path: Path) -> CheckpointError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    message = "disk is full" if full else f"cannot be written: {error.strerror or error}"
    hint = "make room and run the same command again, it continues where it stopped" if full else None
    return CheckpointError(message, file=path, hint=hint)
