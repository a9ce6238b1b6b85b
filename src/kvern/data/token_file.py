"""Tokenised documents on disk: one file, written in one pass, memory-mapped for reading.

    KVERNTOK | token ids | marks of what is learned | table of documents | names of their files | trailer | seal

Ids have 2 bytes where the vocabulary allows it, else 4; marks have one byte a token and are there only where something
is not learned. The trailer is JSON and its length: the counts, and what the file was made from (`made_from`), so that
a reader knows whether it is stale. The seal is the SHA-256 of all before it, and KVERNTOK again: a file that was cut
short has no seal, and one that was damaged has a wrong one.

The file is written under `NAME.part`, synced, and renamed: whenever the process dies, there is a whole file or none.
Memory: 24 bytes a document. What this gives up: opening reads the file once (1.5 GB/s), to verify it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from kvern.errors import DataError

MAGIC = b"KVERNTOK"
VERSION = 1
LENGTH = struct.Struct("<Q")
SEAL = struct.Struct("<32s8s")
ALIGNMENT = 8
CHUNK_BYTES = 8 << 20
DOCUMENT = np.dtype([("end", "<u8"), ("utf8_bytes", "<u8"), ("file", "<u4"), ("line", "<u4")])


@dataclass(frozen=True)
class Origin:
    """Where a document came from; line 0: it is the whole file."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


class TokenFile:
    """D documents of T tokens in all. Threads and forked processes may share it.

    digest: hex SHA-256 of ids, marks and table, whatever the files were called. made_from: what the writer said.
    """

    def __init__(self, path: Path, view: memoryview, trailer: Mapping[str, Any]) -> None:
        self.path = path
        self.digest: str = trailer["digest"]
        self.made_from: dict[str, Any] = trailer["made_from"]
        sections = _Sections(view)
        self._ids = sections.take(np.dtype(trailer["dtype"]), trailer["tokens"])
        self._marks = sections.take(np.dtype(np.bool_), trailer["tokens"]) if trailer["has_marks"] else None
        self._table = sections.take(DOCUMENT, trailer["documents"])
        self._names: list[str] = json.loads(sections.take(np.dtype(np.uint8), trailer["names_bytes"]).tobytes())

    @classmethod
    def open(cls, path: Path) -> TokenFile:
        """Map and verify a file. Raises DataError for one that is missing, damaged, or of another version."""
        try:
            with path.open("rb") as stream:
                view = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise DataError(f"cannot be read: {error}", file=path) from error
        if len(view) < SEAL.size or view[: len(MAGIC)] != MAGIC or view[-len(MAGIC) :] != MAGIC:
            raise DataError("cut short, or not a file of tokens", file=path)
        digest, _ = SEAL.unpack(view[-SEAL.size :])
        body = view[: -SEAL.size]
        if _sha256(body) != digest:
            raise DataError("damaged: its checksum is wrong", file=path)
        (trailer_bytes,) = LENGTH.unpack(body[-LENGTH.size :])
        trailer = json.loads(bytes(body[-LENGTH.size - trailer_bytes : -LENGTH.size]))
        if trailer["version"] != VERSION:
            raise DataError(f"written in version {trailer['version']} of the format, not {VERSION}", file=path)
        return cls(path, view, trailer)

    def __len__(self) -> int:
        return len(self._table)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[D], in tokens."""
        ends = self._table["end"].astype(np.int64)
        ends[1:] -= ends[:-1].copy()
        return ends

    @property
    def tokens(self) -> int:
        return len(self._ids)

    @cached_property
    def utf8_bytes(self) -> int:
        """Of the text of all documents: what bits per byte are counted over."""
        return int(self._table["utf8_bytes"].sum())

    def read(self, document: int, begin: int, end: int) -> tuple[NDArray[np.integer], NDArray[np.bool_] | None]:
        """Tokens `begin` to `end` of a document, and which of them are learned (None: all). Views of the file."""
        first = int(self._table["end"][document - 1]) if document else 0
        part = slice(first + begin, first + end)
        return self._ids[part], None if self._marks is None else self._marks[part]

    def origin(self, document: int) -> Origin:
        _, _, file, line = self._table[document]
        return Origin(self._names[file], int(line))


class TokenFileWriter:
    """Made by `write`: takes documents one by one. What is put into `made_from` is kept in the file."""

    def __init__(self, stream: _Stream, marks: _Stream, vocab_size: int) -> None:
        self.made_from: dict[str, Any] = {}
        self.tokens = 0
        self._out = stream
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._vocab_size = vocab_size
        self._marks = marks
        self._ends, self._bytes = array("Q"), array("Q")
        self._files, self._lines = array("I"), array("I")
        self._names: dict[str, int] = {}
        self._out.write(MAGIC)

    def add(
        self,
        ids: Sequence[int] | NDArray[np.integer],
        learned: Sequence[bool] | NDArray[np.bool_] | None,
        utf8_bytes: int,
        origin: Origin,
    ) -> None:
        """Append a document. learned None: all of it. Raises DataError for no ids, or one outside the vocabulary."""
        values = np.asarray(ids, dtype=np.int64)
        if not len(values):
            raise DataError("a document without tokens", file=str(origin))
        if values.min() < 0 or values.max() >= self._vocab_size:
            wrong = int(values.min() if values.min() < 0 else values.max())
            raise DataError(f"token id {wrong} is outside the vocabulary of {self._vocab_size}", file=str(origin))
        if learned is not None:
            self._mark(np.asarray(learned, dtype=np.bool_), len(values), origin)
        self._out.write(values.astype(self._dtype).tobytes())
        self.tokens += len(values)
        self._ends.append(self.tokens)
        self._bytes.append(utf8_bytes)
        self._files.append(self._names.setdefault(origin.file, len(self._names)))
        self._lines.append(origin.line)

    def finish(self) -> None:
        """Write everything behind the ids. `write` calls this."""
        self._out.pad()
        has_marks = bool(self._marks.written)
        if has_marks:
            self._mark_all_until(self.tokens)
            for chunk in self._marks.read_back():
                self._out.write(chunk)
            self._out.pad()
        self._out.write(self._table().tobytes())
        digest = self._out.digest.hexdigest()
        names = json.dumps(list(self._names)).encode()
        self._out.write(names)
        self._out.pad()
        trailer = {
            "version": VERSION,
            "dtype": self._dtype.str,
            "tokens": self.tokens,
            "documents": len(self._ends),
            "has_marks": has_marks,
            "names_bytes": len(names),
            "digest": digest,
            "made_from": self.made_from,
        }
        text = json.dumps(trailer).encode()
        self._out.write(text + LENGTH.pack(len(text)))
        self._out.write(SEAL.pack(self._out.digest.digest(), MAGIC))

    def _table(self) -> NDArray[Any]:
        table = np.empty(len(self._ends), DOCUMENT)
        columns = (self._ends, self._bytes, self._files, self._lines)
        for name, column in zip(DOCUMENT.names or (), columns, strict=True):
            table[name] = column
        return table

    def _mark(self, learned: NDArray[np.bool_], count: int, origin: Origin) -> None:
        if len(learned) != count:
            raise DataError(f"{count} tokens and {len(learned)} marks of what is learned", file=str(origin))
        self._mark_all_until(self.tokens)
        self._marks.write(learned.tobytes())

    def _mark_all_until(self, tokens: int) -> None:
        """Documents without marks are learned from their first token to their last."""
        while missing := tokens - self._marks.written:
            self._marks.write(b"\1" * min(missing, CHUNK_BYTES))


@contextmanager
def write(path: Path, vocab_size: int) -> Iterator[TokenFileWriter]:
    """Write a file of documents; it appears at `path` when the block has ended well.

    Raises DataError where the disk is full or the folder cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with _naming(path):
            file = part.open("w+b", CHUNK_BYTES)
        with file, tempfile.TemporaryFile(dir=path.parent) as marks:
            writer = TokenFileWriter(_Stream(file, path), _Stream(marks, path), vocab_size)
            yield writer
            writer.finish()
            with _naming(path):
                file.flush()
                os.fsync(file.fileno())
        with _naming(path):
            part.replace(path)
            _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", file=path) from error


class _Stream:
    """A file that is being written, with the digest and the count of its bytes. `path`: what errors name."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = file
        self._path = path
        self.digest = hashlib.sha256()
        self.written = 0

    def write(self, data: bytes) -> None:
        with _naming(self._path):
            self._file.write(data)
        self.digest.update(data)
        self.written += len(data)

    def pad(self) -> None:
        self.write(bytes(-self.written % ALIGNMENT))

    def read_back(self) -> Iterator[bytes]:
        self._file.seek(0)
        while chunk := self._file.read(CHUNK_BYTES):
            yield chunk


class _Sections:
    """Cuts a file into its sections, one after the other."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = len(MAGIC)

    def take(self, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        section = np.frombuffer(self._view, dtype, count, self._at)
        end = self._at + section.nbytes
        self._at = end + -end % ALIGNMENT
        return section


def _sha256(view: memoryview) -> bytes:
    digest = hashlib.sha256()
    for begin in range(0, len(view), CHUNK_BYTES):
        digest.update(view[begin : begin + CHUNK_BYTES])
    return digest.digest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
