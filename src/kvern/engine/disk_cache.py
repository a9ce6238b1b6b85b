"""A bounded folder of named records, for cache rows that are to outlive the process: checksums, no trust, no waiting.

    FOLDER/key                  32 random bytes, 0600: names are keyed hashes, so they tell nothing of what was cached
    FOLDER/lock                 held by the process that uses the folder
    FOLDER/rows/ab/abcd...      one record: magic, name, length, SHA-256 of all that and of the payload; the payload

A record is written under another name and renamed, so it is there whole or not at all, whenever the process dies. After
a power failure it may be there in part: the checksum tells, as it tells of every other damage. Such a record is deleted
and was never there. Nothing is synced to the disk: all of it can be computed again. What was used longest ago goes
first, and of one chain its end before its beginning; a restart takes the order from the files' times.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import secrets
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HEADER = struct.Struct("<8s32sQ32s")
MAGIC = b"KVROWS01"
NAME = re.compile(r"[0-9a-f]{64}")
KEY_BYTES = 32
PAGE = 4096
"""Files are counted in whole pages."""

TOUCH_SECONDS = 60.0
"""A file's time is not set more often than that."""

log = logging.getLogger(__name__)


@dataclass
class _Entry:
    size: int
    touched: float = float("-inf")


def file_bytes(payload: int) -> int:
    """What a record of so many bytes takes of the bound."""
    return -(-(HEADER.size + payload) // PAGE) * PAGE


class DiskCache:
    """Records of `payload` bytes each in `folder`, together at most `most_bytes` (whatever is in there is counted).

    Raises OSError where the folder cannot be written to or another process uses it. Methods may be called from any
    thread, but `put` and `touch` from one only.
    """

    def __init__(self, folder: Path, most_bytes: int, payload: int) -> None:
        self.folder, self.most_bytes, self.payload = folder, most_bytes, payload
        self.lock = threading.RLock()
        self.bytes = self.evicted = self.corrupt = 0
        self._index: OrderedDict[str, _Entry] = OrderedDict()
        self._rows = folder / "rows"
        self._rows.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._held = _hold(folder / "lock")
        try:
            self._key = _key(folder / "key")
            self._scan()
            self._make_room(0)
        except BaseException:
            os.close(self._held)
            raise

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def name(self, what: bytes) -> str:
        """The name of what is known by these bytes."""
        return hashlib.blake2b(what, key=self._key, digest_size=32).hexdigest()

    def put(self, name: str, payload: bytes, wanted: Callable[[], bool] = lambda: True) -> bool:
        """Store a record, after making room for it; False: it is not `wanted` any more. Raises OSError."""
        size, path = file_bytes(len(payload)), self._path(name)
        part = path.with_name(f"{name}.part")
        self._make_room(size)
        try:
            _write(part, _header(name, payload), payload)
            with self.lock:
                if not wanted():
                    part.unlink()
                    return False
                part.replace(path)
                self._forget(name)
                self._index[name] = _Entry(size)
                self.bytes += size
        except OSError:
            part.unlink(missing_ok=True)
            raise
        return True

    def read(self, name: str, buffer: bytearray) -> memoryview | None:
        """The payload, in a buffer that `buffer()` made; None where there is none, or it was damaged and is deleted."""
        try:
            length = _read(self._path(name), buffer)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("a record of the prefix cache on disk could not be read: %s", error)
            self.remove([name])
            return None
        payload = memoryview(buffer)[HEADER.size : HEADER.size + self.payload]
        if length == HEADER.size + self.payload and buffer[: HEADER.size] == _header(name, payload):
            return payload
        self.corrupt += 1
        log.warning("a record of the prefix cache on disk is damaged and was deleted: %s", name)
        self.remove([name])
        return None

    def buffer(self) -> bytearray:
        """Room to read a record, and to notice that it is too long."""
        return bytearray(HEADER.size + self.payload + 1)

    def remove(self, names: Sequence[str]) -> None:
        """Delete these records, where there are such."""
        with self.lock:
            for name in names:
                self._forget(name)
                try:
                    self._path(name).unlink(missing_ok=True)
                except OSError as error:
                    log.warning("a record of the prefix cache on disk could not be deleted: %s", error)

    def touch(self, names: Sequence[str]) -> None:
        """A chain of records was used: its first is now the last to be evicted, then its second ..."""
        now, ns = time.monotonic(), time.time_ns()
        stale = []
        with self.lock:
            for depth in reversed(range(len(names))):
                entry = self._index.get(names[depth])
                if entry is not None:
                    self._index.move_to_end(names[depth])
                    if now - entry.touched > TOUCH_SECONDS:
                        entry.touched = now
                        stale.append(depth)
        for depth in stale:
            try:
                os.utime(self._path(names[depth]), ns=(ns - depth, ns - depth))
            except OSError:  # evicted meanwhile, or not ours: the order after a restart is all that depends on it
                continue

    def close(self) -> None:
        """Let another process use the folder."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def _path(self, name: str) -> Path:
        return self._rows / name[:2] / name

    def _make_room(self, size: int) -> None:
        """Evict until so many bytes fit."""
        while self.bytes + size > self.most_bytes and self._index:
            name = next(iter(self._index))
            self._path(name).unlink(missing_ok=True)
            with self.lock:
                self._forget(name)
            self.evicted += 1

    def _forget(self, name: str) -> None:
        entry = self._index.pop(name, None)
        if entry is not None:
            self.bytes -= entry.size

    def _scan(self) -> None:
        """Find what there is, in order of its use; delete what a killed writer left."""
        for _, name, size in sorted(self._found()):
            self._index[name] = _Entry(size)
            self.bytes += size

    def _found(self) -> Iterator[tuple[int, str, int]]:
        """(time, name, bytes) of every record."""
        for folder in [one for one in os.scandir(self._rows) if one.is_dir(follow_symlinks=False)]:
            for entry in os.scandir(folder):
                stem, _, kind = entry.name.partition(".")
                if NAME.fullmatch(stem) is None or not entry.is_file(follow_symlinks=False):
                    continue
                if kind == "part":
                    Path(entry).unlink()
                elif not kind and stem[:2] == folder.name:
                    state = entry.stat()
                    yield state.st_mtime_ns, entry.name, file_bytes(max(0, state.st_size - HEADER.size))


def _header(name: str, payload: bytes | memoryview) -> bytes:
    label, length = bytes.fromhex(name), len(payload)
    digest = hashlib.sha256(HEADER.pack(MAGIC, label, length, bytes(32)))
    digest.update(payload)
    return HEADER.pack(MAGIC, label, length, digest.digest())


def _write(path: Path, header: bytes, payload: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, flags, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(header)
        stream.write(payload)


def _read(path: Path, buffer: bytearray) -> int:
    """Fill the buffer from the file's beginning, as far as it goes."""
    with path.open("rb", buffering=0) as stream:
        at = 0
        while at < len(buffer) and (count := stream.readinto(memoryview(buffer)[at:])):
            at += count
        return at


def _hold(path: Path) -> int:
    """A descriptor of the file, which no other process holds."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise OSError(error.errno, "another process uses the folder", str(path.parent)) from error
    return descriptor


def _key(path: Path) -> bytes:
    """The folder's key; a new one where there is none, and then no record of old is found any more."""
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        key = b""
    if len(key) == KEY_BYTES:
        path.chmod(0o600)
        return key
    key, part = secrets.token_bytes(KEY_BYTES), path.with_name("key.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(key)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)
    return key
