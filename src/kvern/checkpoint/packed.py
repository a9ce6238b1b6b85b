"""Keeps packed weights in a file beside the checkpoint, so that a model starts from a mapping instead of a conversion.

    8 bytes magic | tensors, each at a multiple of 64 | index (JSON) | offset, length, hash of the index, 8 bytes each

The index holds a hash of every 64 MiB of what comes before it; all are checked before anything is computed, which also
brings the file into memory, in order, and takes no longer than that. With room for it the file is read into large
pages, with which a step reads weights 1.6 times as fast on some machines (docs/LOG.md); else it is mapped.

The file belongs to one arrangement of tiles (the CPU's, see `ops.packed.order`), one version of the format and one
state of the checkpoint (names, sizes and times of its files): where any of these differs, or the hashes do, it is
written anew. It is written as `NAME.part`, one weight after the other, held by one process at a time, and renamed when
complete: a reader sees all of it or none, whoever comes second waits and finds it, and what a killed writer left is
written over. Where the folder cannot be written to, the packed weights stay in memory.

What it gives up: disk space of the size of the checkpoint. Without it the checkpoint still runs (model.Transformer).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kvern.checkpoint.local import work_folder
from kvern.checkpoint.reader import CONFIG_FILE, SafetensorsFolder
from kvern.checkpoint.save import Progress
from kvern.errors import CheckpointError
from kvern.model import Transformer
from kvern.model.packed import PackedNow, PackedTransformer, PackedWeights
from kvern.ops import packed
from kvern.ops.library import threads
from kvern.plan.hardware import machine

MAGIC = b"KVPACK01"
VERSION = 6
ALIGNMENT = 64
SECTION = 1 << 26
"""Bytes under one hash, a multiple of a page."""

FOOTER = struct.Struct("<QQQ")
PARTS = ("tiles", "scales", "picks", "factors")


def packed_transformer(model: Transformer, folder: Path, progress: Progress | None = None) -> PackedTransformer:
    """The packed form of a model that was loaded, as stored, from `folder`; packs at most once a checkpoint and CPU."""
    path, source = _path(folder, model), checkpoint_state(folder)
    weights = _open(path, source)
    if weights is None:
        try:
            weights = _written(path, source, model, progress)
        except OSError:
            weights = None
    return PackedTransformer(model, PackedNow() if weights is None else weights)


class PackedFile:
    """The weights of a complete, fitting file, as views of its mapping."""

    def __init__(self, path: Path, data: Tensor, index: dict[str, Any]) -> None:
        self.path, self._data, self._index = path, data, index

    def get(self, name: str, make: Callable[[], packed.Packed]) -> packed.Packed:
        """The stored weight; packed now where the file has none of that name. CheckpointError where parts are short."""
        entry = self._index.get(name)
        if entry is None:
            return make()
        parts = {part: self._tensor(part, *entry[part]) for part in PARTS if part in entry}
        one = packed.Packed(packed.Kind(entry["kind"]), entry["n"], entry["k"], entry["group"], **parts)
        if not one.is_whole:
            raise CheckpointError(
                "packed weight lacks bytes", file=self.path, tensor=name, hint="delete the file, it is written anew"
            )
        return one

    def _tensor(self, part: str, start: int, length: int) -> Tensor:
        data = self._data[start : start + length]
        return data.view({"picks": torch.int32, "factors": torch.float32}.get(part, torch.uint8))


class _Writer:
    """Stands in for the stored weights while a model is packed for the first time: packs and writes each, keeps none.

    The model that is built of what it returns has the shapes to be checked, and must not compute.
    """

    def __init__(self, stream: BinaryIO, total: int, progress: Progress | None) -> None:
        self.stream, self.total, self.progress = stream, total, progress
        self.index: dict[str, Any] = {}
        self.hashes: list[int] = []

    def get(self, name: str, make: Callable[[], packed.Packed]) -> packed.Packed:
        """Pack, write, and return the weight without its numbers."""
        one = make()
        entry: dict[str, Any] = {"kind": int(one.kind), "n": one.n, "k": one.k, "group": one.group}
        for part in PARTS:
            if (tensor := getattr(one, part)) is not None:
                entry[part] = self._put(tensor)
        self.index[name] = entry
        self._report(min(self.stream.tell(), self.total), name)
        return _hollow(one)

    def finish(self) -> int:
        """Complete the hashes and return where the tensors end."""
        self._align()
        self._hash(1)
        self._report(self.total, next(reversed(self.index)))
        return self.stream.tell()

    def _put(self, tensor: Tensor) -> tuple[int, int]:
        self._align()
        start = self.stream.tell()
        self.stream.write(tensor.contiguous().view(torch.uint8).numpy().data)
        self._hash(SECTION)
        return start, self.stream.tell() - start

    def _align(self) -> None:
        self.stream.write(bytes(-self.stream.tell() % ALIGNMENT))

    def _hash(self, least: int) -> None:
        """Hash what was written since the last section, where that is at least so much, while it is in memory."""
        end = self.stream.tell()
        while end - (start := len(self.hashes) * SECTION) >= least:
            self.stream.flush()
            section = _map(self.stream.fileno(), min(SECTION, end - start), start)
            self.hashes.append(packed.content_hash(section))

    def _report(self, done: int, name: str) -> None:
        if self.progress is not None:
            self.progress(done, self.total, name)


NOTHING = torch.zeros(1, dtype=torch.uint8)


def _hollow(one: packed.Packed) -> packed.Packed:
    """The weight with one byte in the place of its tiles and scales; its picks, which are checked, stay."""
    tiles, scales = (None if part is None else NOTHING for part in (one.tiles, one.scales))
    return replace(one, tiles=tiles, scales=scales)


def _written(path: Path, source: str, model: Transformer, progress: Progress | None) -> PackedWeights | None:
    """The weights of the file that this process wrote, or another one while this one waited."""
    part = path.with_name(path.name + ".part")
    with _held(part) as stream:
        weights = _open(path, source)
        if weights is not None:
            part.unlink()
            return weights
        try:
            _write(stream, source, model, progress)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    return _open(path, source)


@contextmanager
def _held(part: Path) -> Iterator[BinaryIO]:
    """The file of that name, for this process alone and empty; waits for the one that holds it."""
    while True:
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "w+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if _is_named(stream, part):
                stream.truncate(0)
                yield stream
                return


def _is_named(stream: BinaryIO, path: Path) -> bool:
    """Whether the open file still has this name: another process may have renamed or removed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _write(stream: BinaryIO, source: str, model: Transformer, progress: Progress | None) -> None:
    stream.write(MAGIC)
    writer = _Writer(stream, _bytes(model), progress)
    PackedTransformer(model, writer)
    end = writer.finish()
    about = {"version": VERSION, "source": source, "hashes": writer.hashes, "weights": writer.index}
    index = json.dumps(about).encode()
    stream.write(index + FOOTER.pack(end, len(index), _hash(index)))
    stream.flush()
    os.fsync(stream.fileno())


def _open(path: Path, source: str) -> PackedWeights | None:
    """The weights of the file, where it is whole, of this version and of this checkpoint."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            if size < len(MAGIC) + FOOTER.size:
                return None
            data = _in_large_pages(stream.fileno(), size) if _has_room(size) else _map(stream.fileno(), size)
    except OSError:
        return None
    start, length, index_hash = FOOTER.unpack(bytes(data[-FOOTER.size :].numpy()))
    if bytes(data[: len(MAGIC)].numpy()) != MAGIC or start + length + FOOTER.size != size:
        return None
    text = bytes(data[start : start + length].numpy())
    if _hash(text) != index_hash:
        return None
    index = json.loads(text)
    if (index.get("version"), index.get("source")) != (VERSION, source):
        return None
    sections = (data[at : min(at + SECTION, start)] for at in range(0, start, SECTION))
    if [packed.content_hash(section) for section in sections] != index["hashes"]:
        return None
    return PackedFile(path, data, index["weights"])


def _map(descriptor: int, size: int, start: int = 0) -> Tensor:
    """So many bytes of a file, mapped; writes would stay private. `start` is a multiple of a page."""
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    mapping = mmap.mmap(descriptor, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
    return torch.frombuffer(mapping, dtype=torch.uint8)


def _has_room(size: int) -> bool:
    """Whether a copy leaves as much memory again: mapped pages could be given back, and shared with other processes."""
    return hasattr(mmap, "MADV_HUGEPAGE") and machine().memory_available > 2 * size


def _in_large_pages(descriptor: int, size: int) -> Tensor:
    """So many bytes of a file, read by several threads into pages of 2 MiB, where the system has such."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)

    def read(start: int) -> None:
        at, end = start, min(start + SECTION, size)
        while at < end:
            count = os.preadv(descriptor, [view[at:end]], at)
            if count == 0:
                raise OSError("the file became shorter")
            at += count

    with ThreadPoolExecutor(threads()) as pool:
        list(pool.map(read, range(0, size, SECTION)))
    return torch.frombuffer(memory, dtype=torch.uint8)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def _path(folder: Path, model: Transformer) -> Path:
    mtp = "-mtp" if len(model.model.layers) > model.config.num_hidden_layers else ""
    return work_folder(folder) / f"packed-{packed.order()}{mtp}.kvern"


def checkpoint_state(folder: Path) -> str:
    """A fingerprint of the checkpoint: names, sizes and times of its files."""
    files = [folder / CONFIG_FILE, *SafetensorsFolder(folder).files()]
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


def _bytes(model: Transformer) -> int:
    """About how large the file will be: what a step reads, the embedding left out."""
    return sum(one.numel() * one.element_size() for name, one in model.named_parameters() if "embed_tokens" not in name)
