"""Between the cache in memory and the one on the disk: one thread writes behind, one reads ahead.

    engine: offer(full block) -> a copy in a bounded queue -> writer: record of the chained hash
    engine: load(hashes, blocks) -> reader: records, checked, into those blocks -> engine: seal

A block is known by its chained hash, in which the salt is, and by all else that makes its rows right (see
`spill_opening`). Where the queue is full, a request offers the block again in its next step; where the disk fails, that
is logged, and nothing is written for a while.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray

from kvern.engine.cache import PagedCache
from kvern.engine.disk_cache import DiskCache
from kvern.engine.request import Request
from kvern.engine.settings import DiskStats

QUEUE_BYTES = 128 * 2**20
"""Copies that may wait for the writer."""

BLOCKS_A_STEP = 64
"""Blocks of one request that are looked at in a step, and copied where the disk lacks them."""

PAUSE_SECONDS = 60.0
"""Without writing, after the disk failed."""

PATIENCE_SECONDS = 30.0
"""For one record that is read."""

CLOSING_SECONDS = 10.0
"""For what is still to be written when the engine is closed."""

Bytes = NDArray[np.uint8]
"""Numpy's copies take one thread: torch would wake all of its own, beside a step that computes, for every block."""

log = logging.getLogger(__name__)


class Load:
    """A chain of records on its way into blocks; the first `done` of them are there."""

    def __init__(self, hashes: Sequence[bytes], blocks: Sequence[int], kept: int, rows: Bytes) -> None:
        self.hashes, self.blocks, self.kept = hashes, blocks, kept
        """The first `kept` blocks were in memory and are only held; the others are to be filled."""
        self.started = time.monotonic()
        self.finished = threading.Event()
        self.done = 0
        self._rows = rows
        self._cancelled = False
        self._lock = threading.Lock()

    @property
    def missing(self) -> Sequence[bytes]:
        """The chain without what was in memory."""
        return self.hashes[self.kept :]

    def fill(self, payload: memoryview) -> bool:
        """Put the next record into its block; False: nobody wants it any more."""
        with self._lock:
            if self._cancelled:
                return False
            target = self._rows[:, self.blocks[self.kept + self.done]]
            target[:] = np.frombuffer(payload, dtype=np.uint8).reshape(target.shape)
            self.done += 1
            return True

    def cancel(self) -> None:
        """From now on no block is written to."""
        with self._lock:
            self._cancelled = True


@dataclass
class _Writing:
    """What the writer has to do, and what it did. It holds nothing of the engine."""

    disk: DiskCache
    pending: OrderedDict[str, Bytes] = field(default_factory=OrderedDict)
    touched: deque[list[str]] = field(default_factory=lambda: deque(maxlen=256))
    current: str | None = None
    closing: bool = False
    retry_at: float = 0.0
    written: int = 0
    failures: int = 0

    def __post_init__(self) -> None:
        self.changed = threading.Condition(self.disk.lock)

    def run(self) -> None:
        """The writer's thread: until it is closed and nothing is left."""
        while True:
            with self.changed:
                while not (self.pending or self.touched or self.closing):
                    self.changed.wait()
                if not (self.pending or self.touched):
                    return
                names = self.touched.popleft() if self.touched else []
                self.current, payload = self.pending.popitem(last=False) if self.pending else (None, None)
            try:
                self.disk.touch(names)
                if self.current is not None and payload is not None:
                    self._write(self.current, payload)
            except OSError as error:
                self._pause(error)
            except Exception:
                log.exception("the writer of the prefix cache on disk met a fault")
            with self.changed:
                self.current = None
                self.changed.notify_all()

    def _write(self, name: str, payload: Bytes) -> None:
        content = payload.tobytes()
        if self.disk.put(name, content, lambda: self.current == name):
            self.written += len(content)

    def _pause(self, error: OSError) -> None:
        self.failures += 1
        log.warning("the prefix cache cannot be written to the disk (%s); again in %.0f s", error, PAUSE_SECONDS)
        with self.changed:
            self.retry_at = time.monotonic() + PAUSE_SECONDS
            self.pending.clear()


@dataclass
class _Reading:
    """What the reader has to do, and when it last got on."""

    disk: DiskCache
    loads: SimpleQueue[tuple[Load, list[str]] | None] = field(default_factory=SimpleQueue)
    got_on: float = 0.0

    def run(self) -> None:
        """The reader's thread: load after load, until there is None."""
        buffer = self.disk.buffer()
        while (one := self.loads.get()) is not None:
            try:
                self._read(*one, buffer)
            except Exception:
                log.exception("the reader of the prefix cache on disk met a fault")
            finally:
                one[0].finished.set()
                del one

    def _read(self, load: Load, names: Sequence[str], buffer: bytearray) -> None:
        for name in names:
            self.got_on = time.monotonic()
            payload = self.disk.read(name, buffer)
            if payload is None or not load.fill(payload):
                return


class Spill:
    """The disk's side of an engine's cache. All methods are the engine's, but `stats`, which is anybody's."""

    def __init__(self, disk: DiskCache, cache: PagedCache, layers: int, validity: bytes) -> None:
        self.disk = disk
        self._size = cache.block_size
        self._validity = validity
        self._rows = block_records(cache, layers)
        self._record = self._rows[:, 0].size
        self._most = max(1, QUEUE_BYTES // self._record)
        self._queries = self._hits = self._loaded = 0
        self._broken = False
        self._writing = _Writing(disk)
        self._reading = _Reading(disk)
        writer = threading.Thread(target=self._writing.run, name="kvern-spill", daemon=True)
        reader = threading.Thread(target=self._reading.run, name="kvern-prefetch", daemon=True)
        writer.start()
        reader.start()
        self._close = weakref.finalize(self, _close, self._writing, self._reading, (writer, reader))

    def offer(self, request: Request) -> None:
        """Let the writer have the full blocks of a request that it has not seen; `blocks` and hashes are complete."""
        full = request.computed // self._size
        for index in range(request.spilled, min(full, request.spilled + BLOCKS_A_STEP)):
            if not self._put(self._name(request.block_hashes[index]), request.blocks[index]):
                return
            request.spilled = index + 1

    def _put(self, name: str, block: int) -> bool:
        """Whether the block is on the disk, or on its way."""
        writing = self._writing
        with writing.changed:
            if name in self.disk or name in writing.pending or name == writing.current:
                return True
            if len(writing.pending) >= self._most or writing.closing or time.monotonic() < writing.retry_at:
                return False
            writing.pending[name] = self._rows[:, block].copy()
            writing.changed.notify_all()
        return True

    def ended(self, request: Request, trusted: bool) -> None:
        """A request ended: its prefix was used, or what its blocks hold is not to be trusted and nobody finds them."""
        if not trusted:
            self._distrust(request.block_hashes)
            return
        names = [self._name(one) for one in request.block_hashes[: request.spilled]]
        with self._writing.changed:
            self._writing.touched.append(names)
            self._writing.changed.notify_all()

    def _distrust(self, hashes: Sequence[bytes]) -> None:
        names = [self._name(one) for one in hashes]
        with self._writing.changed:
            for name in names:
                self._writing.pending.pop(name, None)
            if self._writing.current in names:
                self._writing.current = None
            self.disk.remove([name for name in names if name in self.disk])

    def found(self, hashes: Sequence[bytes]) -> int:
        """How many records of this chain the disk has, from its beginning."""
        return 0 if self._broken else sum(1 for _ in takewhile(lambda one: self._name(one) in self.disk, hashes))

    def load(self, hashes: Sequence[bytes], blocks: Sequence[int], kept: int) -> Load:
        """Begin to read a chain, whose first `kept` blocks are in memory, into the rest of `blocks`."""
        load = Load(hashes, blocks, kept, self._rows)
        self._queries += len(load.missing) * self._size
        self._reading.loads.put((load, [self._name(one) for one in load.missing]))
        return load

    def loaded(self, load: Load) -> None:
        """Count what came."""
        self._hits += load.done * self._size
        self._loaded += load.done * self._record

    def is_stuck(self, load: Load) -> bool:
        """Whether the disk gave nothing for so long that nobody should wait for it; then nothing is read any more."""
        last = max(load.started, self._reading.got_on)
        if load.finished.is_set() or time.monotonic() - last < PATIENCE_SECONDS:
            return False
        if not self._broken:
            log.warning("the prefix cache on disk does not answer and is not read any more")
        self._broken = True
        return True

    def flush(self, seconds: float = CLOSING_SECONDS) -> bool:
        """Wait until everything that was offered is on the disk; whether that came about."""
        writing = self._writing
        with writing.changed:
            return writing.changed.wait_for(
                lambda: not (writing.pending or writing.touched or writing.current), seconds
            )

    def close(self) -> None:
        """Write what waits, for a while, and let another process use the folder."""
        self._close()

    def stats(self) -> DiskStats:
        """A snapshot for metrics."""
        return DiskStats(
            blocks=len(self.disk),
            bytes=self.disk.bytes,
            queries=self._queries,
            hits=self._hits,
            read_bytes=self._loaded,
            written_bytes=self._writing.written,
            evicted=self.disk.evicted,
            corrupt=self.disk.corrupt,
            failures=self._writing.failures,
        )

    def _name(self, block_hash: bytes) -> str:
        return self.disk.name(self._validity + block_hash)


def _close(writing: _Writing, reading: _Reading, threads: Sequence[threading.Thread]) -> None:
    with writing.changed:
        writing.closing = True
        writing.changed.notify_all()
    reading.loads.put(None)
    deadline = time.monotonic() + CLOSING_SECONDS
    for thread in threads:
        if thread is not threading.current_thread():  # a collection of garbage may close it from anywhere
            thread.join(max(0.0, deadline - time.monotonic()))
    writing.disk.close()


def block_records(cache: PagedCache, layers: int) -> Bytes:
    """[layers, blocks, bytes of a block in a layer] uint8, a view of the rows."""
    rows = cache.rows[:layers].view(torch.uint8)
    return rows.view(layers, rows.shape[1] // cache.block_size, cache.block_size * rows.shape[2]).numpy()
