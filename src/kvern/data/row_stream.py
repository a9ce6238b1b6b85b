"""The rows of a training run: a pure function of (seed, index), whatever asks for them and in which order.

An epoch takes from each source its share (weight 1: every token once; 0.5: the half that the epoch before did not
take; 2: everything twice) and gives the documents an order of its own. Documents are then written one after the other
and cut every `length` tokens: what is left of one begins the next row, as a document of its own. Sources that are
`whole` are packed so that none is cut. In the end the rows are shuffled, so that a long file does not fill a batch.

    epoch e     one source: a b c d e     order: d b a e c     rows: [d b b|b a a|e e c|c]     shuffled: row 2, 0, 3, 1

So the state of a run is (seed, rows consumed): nothing is replayed, and no count of processes plays a part. Memory:
about 50 bytes a document (times its weight) and 8 a row; 4 bytes a document more where rows are whole.
What this gives up: the first token of a rest is predicted by nothing, and sees nothing of what stood before it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvern.data.order import order
from kvern.data.packing import Packed, best_fit
from kvern.errors import ConfigError, DataError

MIXED, ROWS = -1, -2
"""Names of orders, beside the numbers of the sources, which count from 0."""


class Documents(Protocol):
    """What rows are made of; `kvern.data.token_file.TokenFile` is one."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[D], in tokens, each at least 1."""

    @property
    def utf8_bytes(self) -> int:
        """Of the text of all documents."""

    @property
    def digest(self) -> str:
        """Names the content."""

    def read(self, document: int, begin: int, end: int) -> tuple[NDArray[np.integer], NDArray[np.bool_] | None]:
        """Some tokens of a document, and which of them are learned (None: all)."""

    def origin(self, document: int) -> object:
        """What to call the document in an error: file and line."""


@dataclass(frozen=True)
class Source:
    """Documents and what an epoch takes of them.

    weight: how often an epoch takes each token, above 0. whole: documents are never cut, and fill rows of their own.
    """

    documents: Documents
    weight: float = 1.0
    whole: bool = False


@dataclass(frozen=True)
class Row:
    """Tokens to train on, at most as many as a row holds.

    tokens [n] int64; lengths: of its documents, n in all; learned [n] bool: what is to be predicted (None: all).
    """

    tokens: NDArray[np.int64]
    lengths: tuple[int, ...]
    learned: NDArray[np.bool_] | None

    def cut(self, length: int) -> Row:
        """The same tokens as documents of at most `length`: what is left of one is a document of its own."""
        pieces = (min(length, whole - begin) for whole in self.lengths for begin in range(0, whole, length))
        return replace(self, lengths=tuple(pieces))


@dataclass(frozen=True)
class _Pieces:
    """Parts of documents, in the order in which rows take them; each array [P] int64."""

    sources: NDArray[np.int64]
    documents: NDArray[np.int64]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]


@dataclass(frozen=True)
class _Epoch:
    """offsets [P + 1]: where pieces begin among the epoch's tokens. rows: which row comes when; whole ones last."""

    number: int
    pieces: _Pieces
    offsets: NDArray[np.int64]
    whole: _Pieces
    rows: NDArray[np.int64]


class RowStream:
    """Rows of up to `length` tokens. It has no state; threads and forked processes may share it."""

    def __init__(self, sources: Sequence[Source], length: int, seed: int = 0) -> None:
        """Raises ConfigError for numbers out of range, DataError where a document is too long to stay whole."""
        if length < 2:
            raise ConfigError(f"a row must hold at least 2 tokens, not {length}", param="length")
        _check(sources)
        self.length = length
        self.seed = seed
        self.sources = tuple(sources)
        self._cut = [number for number, source in enumerate(sources) if not source.whole]
        self._packed = {number: _pack(source, length, seed) for number, source in enumerate(sources) if source.whole}
        self._tokens = {n: _share(int(sources[n].documents.lengths.sum()), sources[n].weight) for n in self._cut}
        self._rows = {n: _share(len(packed), sources[n].weight) for n, packed in self._packed.items()}
        self._cut_rows = -(-sum(self._tokens.values()) // length)
        self._epoch: _Epoch | None = None

    def __len__(self) -> int:
        """Rows of one epoch; every epoch has as many."""
        return self._cut_rows + sum(self._rows.values())

    @property
    def utf8_bytes(self) -> int:
        """Of the text of all documents, each counted once."""
        return sum(source.documents.utf8_bytes for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """Names what `row` returns: a run that is resumed with another one would train on other rows."""
        parts = [f"{source.documents.digest} {source.weight} {source.whole}" for source in self.sources]
        return hashlib.sha256("\n".join([*parts, f"{self.length} {self.seed}"]).encode()).hexdigest()

    def row(self, index: int) -> Row:
        """Row `index`, from 0, without end: epoch after epoch. Raises IndexError for one below 0."""
        if index < 0:
            raise IndexError(f"there is no row {index}")
        epoch = self._at(index // len(self))
        row = int(epoch.rows[index % len(self)])
        if row < self._cut_rows:
            return self._cut_row(epoch, row)
        return self._whole_row(epoch, row - self._cut_rows)

    def _at(self, number: int) -> _Epoch:
        epoch = self._epoch  # threads may replace it at any time
        if epoch is None or epoch.number != number:
            epoch = self._epoch = self._plan(number)
        return epoch

    def _plan(self, number: int) -> _Epoch:
        pieces = _join([self._take(source, number) for source in self._cut])
        mixed = order(len(pieces.documents), self.seed, MIXED, number)
        pieces = _Pieces(*(column[mixed] for column in _columns(pieces)))
        offsets = np.concatenate([[0], np.cumsum(pieces.ends - pieces.begins)])
        whole = _join([self._take_rows(source, number) for source in self._packed])
        return _Epoch(number, pieces, offsets, whole, order(len(self), self.seed, ROWS, number))

    def _take(self, source: int, epoch: int) -> _Pieces:
        """What an epoch takes of a source, from where the one before stopped. Each pass has an order of its own."""
        lengths = self.sources[source].documents.lengths
        total, share = int(lengths.sum()), self._tokens[source]
        first, last = epoch * share, (epoch + 1) * share
        parts = []
        for number in range(first // total, (last - 1) // total + 1):
            documents = order(len(lengths), self.seed, source, number)
            ends = np.cumsum(lengths[documents])
            begins = ends - lengths[documents]
            low, high = max(first - number * total, 0), min(last - number * total, total)
            taken = (ends > low) & (begins < high)
            begins, ends, documents = begins[taken], ends[taken], documents[taken]
            parts.append(
                _Pieces(
                    np.full(len(documents), source, dtype=np.int64),
                    documents,
                    np.maximum(low - begins, 0),
                    np.minimum(high, ends) - begins,
                )
            )
        return _join(parts)

    def _take_rows(self, source: int, epoch: int) -> _Pieces:
        """The packed rows that an epoch takes of a source; `documents` are the rows' numbers."""
        total, share = len(self._packed[source]), self._rows[source]
        first, last = epoch * share, (epoch + 1) * share
        passes = range(first // total, (last - 1) // total + 1)
        rows = np.concatenate([order(total, self.seed, source, number) for number in passes])
        rows = rows[first - passes[0] * total :][:share]
        nothing = np.zeros(share, dtype=np.int64)
        return _Pieces(nothing + source, rows, nothing, nothing)

    def _cut_row(self, epoch: _Epoch, row: int) -> Row:
        begin = row * self.length
        end = min(begin + self.length, int(epoch.offsets[-1]))
        first = int(np.searchsorted(epoch.offsets, begin, side="right")) - 1
        last = int(np.searchsorted(epoch.offsets, end, side="left"))
        parts = []
        for piece in range(first, last):
            offset, start = int(epoch.offsets[piece]), int(epoch.pieces.begins[piece])
            low, high = max(begin - offset, 0), min(end, int(epoch.offsets[piece + 1])) - offset
            source, document = int(epoch.pieces.sources[piece]), int(epoch.pieces.documents[piece])
            parts.append(self.sources[source].documents.read(document, start + low, start + high))
        return _row(parts)

    def _whole_row(self, epoch: _Epoch, row: int) -> Row:
        source = int(epoch.whole.sources[row])
        documents = self.sources[source].documents
        numbers = self._packed[source][int(epoch.whole.documents[row])]
        return _row([documents.read(int(one), 0, int(documents.lengths[one])) for one in numbers])


def _check(sources: Sequence[Source]) -> None:
    if not sources:
        raise ConfigError("there is nothing to train on", hint="name at least one source", param="sources")
    for number, source in enumerate(sources):
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise ConfigError(f"a weight must be above 0, not {source.weight}", param=f"sources.{number}.weight")
        if not len(source.documents.lengths):
            raise DataError(f"source {number} has no documents")


def _share(count: int, weight: float) -> int:
    """How many of `count` an epoch takes."""
    return max(1, round(count * weight))


def _pack(source: Source, length: int, seed: int) -> Packed:
    lengths = source.documents.lengths
    longest = int(np.argmax(lengths))
    if lengths[longest] > length:
        others = int((lengths > length).sum()) - 1
        more = f" ({others} more are too long as well)" if others else ""
        raise DataError(
            f"{int(lengths[longest])} tokens, and a row holds {length}{more}",
            file=str(source.documents.origin(longest)),
            hint="make rows longer, or this one shorter; nothing is cut off",
        )
    return best_fit(lengths, length, seed)


def _columns(pieces: _Pieces) -> tuple[NDArray[np.int64], ...]:
    return pieces.sources, pieces.documents, pieces.begins, pieces.ends


def _join(parts: Sequence[_Pieces]) -> _Pieces:
    nothing = np.zeros(0, dtype=np.int64)
    columns = zip((nothing,) * 4, *map(_columns, parts), strict=True)
    return _Pieces(*(np.concatenate(column) for column in columns))


def _row(parts: Sequence[tuple[NDArray[np.integer], NDArray[np.bool_] | None]]) -> Row:
    tokens = np.concatenate([ids for ids, _ in parts], dtype=np.int64, casting="safe")
    learned = None
    if any(marks is not None for _, marks in parts):
        learned = np.concatenate([np.ones(len(ids), np.bool_) if marks is None else marks for ids, marks in parts])
    return Row(tokens, tuple(len(ids) for ids, _ in parts), learned)
