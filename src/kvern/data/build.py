"""From sources to rows: token files in a folder, made once, and the stream over them.

A source's files are tokenised into NAME-KEY.train.tokens and, where documents are held out, NAME-KEY.held-out.tokens;
KEY stands for all that their ids depend on but the files' contents. Those are known by sizes and times of change, and
where these differ, by their SHA-256: files that are stale, damaged or half written are made anew, never read. One
process makes them, others that call at the same time wait for it. Files of other options stay until removed by hand.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kvern.data import token_file
from kvern.data.encode import Encoder
from kvern.data.files import digest_of, find_files, stamp_of
from kvern.data.options import DataOptions, SourceOptions
from kvern.data.row_stream import RowStream, Source
from kvern.data.sources import ChatDocument, Document, SourceReader
from kvern.data.token_file import TokenFile
from kvern.errors import DataError
from kvern.text.template import ChatTemplate
from kvern.text.tokenizer import Tokenizer

MEANING = 1
"""Goes up when the same documents would become other ids."""

CHATS, TEXTS = "chats", "texts"
TRAIN, HELD_OUT = "train", "held-out"
LOCK = "lock"


class Progress(Protocol):
    """Called with the bytes done, the bytes in all, and what is being read."""

    def __call__(self, done: int, total: int, name: str, /) -> None: ...


@dataclass(frozen=True)
class TextSide:
    """What turns documents into ids; template None: there are no chats."""

    tokenizer: Tokenizer
    template: ChatTemplate | None = None


@dataclass(frozen=True)
class SourceFiles:
    """A source, tokenised. held_out None: nothing is held out of any source."""

    options: SourceOptions
    train: TokenFile
    held_out: TokenFile | None

    @property
    def has_chats(self) -> bool:
        return bool(self.train.made_from["kind"] == CHATS)

    def __str__(self) -> str:
        """`corpus: 1790 documents, 7712345 tokens; left out: 12 empty`."""
        said = f"{self.options.path}: {len(self.train)} documents, {self.train.tokens} tokens"
        if self.held_out is not None:
            said += f"; held out: {len(self.held_out)} documents, {self.held_out.tokens} tokens"
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.train.made_from["skipped"].items()))
        return f"{said}; left out: {skipped}" if skipped else said


@dataclass(frozen=True)
class Corpus:
    """All sources, tokenised. `str` of one of `sources` says what it holds and what was left out."""

    sources: tuple[SourceFiles, ...]

    def train(self, length: int, seed: int = 0) -> RowStream:
        """Rows to train on. Raises DataError for a chat that is longer than a row."""
        return RowStream([_source(one, one.train, one.options.weight) for one in self.sources], length, seed)

    def held_out(self, length: int) -> RowStream | None:
        """Rows of what is never trained on, each document once; None where nothing is held out."""
        kept = [(one, one.held_out) for one in self.sources if one.held_out is not None and len(one.held_out)]
        return RowStream([_source(one, file, 1.0) for one, file in kept], length) if kept else None


def build(options: DataOptions, text: TextSide, folder: Path, progress: Progress | None = None) -> Corpus:
    """Tokenise what is not tokenised yet, into `folder`.

    Raises DataError for files that cannot be used (with file and line), ConfigError for a tokenizer that lacks tokens.
    """
    files = [find_files(source) for source in options.sources]
    with _alone(folder):
        made = [
            _SourceBuild(source, paths, options, text, folder, progress).files()
            for source, paths in zip(options.sources, files, strict=True)
        ]
    if options.held_out and not any(len(one.held_out or ()) for one in made):
        raise DataError(f"none of the documents is held out at a share of {options.held_out}", hint="hold out more")
    return Corpus(tuple(made))


def _source(files: SourceFiles, documents: TokenFile, weight: float) -> Source:
    whole = files.has_chats if files.options.whole is None else files.options.whole
    return Source(documents, weight, whole)


class _SourceBuild:
    """One source on its way to its files."""

    def __init__(
        self,
        source: SourceOptions,
        paths: Sequence[Path],
        options: DataOptions,
        text: TextSide,
        folder: Path,
        progress: Progress | None,
    ) -> None:
        self._source, self._paths, self._options, self._text, self._progress = source, paths, options, text, progress
        self._fim_rate = options.fim_rate if source.fim_rate is None else source.fim_rate
        self._key = self._made_with()
        name = re.sub(r"[^\w.-]+", "-", Path(source.path).name)[:64] or "source"
        base = f"{name}-{hashlib.sha256(repr(self._key).encode()).hexdigest()[:12]}"
        self._train, self._held_out = (folder / f"{base}.{part}.tokens" for part in (TRAIN, HELD_OUT))

    def files(self) -> SourceFiles:
        """Those that are there, or new ones."""
        found = self._open()
        if found is None:
            self._write()
            found = self._open()
        if found is None:
            raise DataError("its files change while they are read", file=self._source.path)
        if not len(found.train):
            raise DataError("all of its documents are held out", file=self._source.path, hint="hold out less")
        return found

    def _made_with(self) -> dict[str, Any]:
        source, template = self._source, self._text.template
        return {
            "meaning": MEANING,
            "tokenizer": self._text.tokenizer.digest,
            "template": None if template is None else hashlib.sha256(template.source.encode()).hexdigest(),
            "fim_rate": self._fim_rate,
            "held_out": self._options.held_out,
            "source": source.model_dump(mode="json", exclude={"weight", "fim_rate", "whole"}),
        }

    def _open(self) -> SourceFiles | None:
        """The files, where they are whole and of this source as it is now."""
        try:
            train = TokenFile.open(self._train)
            held_out = TokenFile.open(self._held_out) if self._options.held_out else None
        except DataError:
            return None
        parts = {TRAIN: train} if held_out is None else {TRAIN: train, HELD_OUT: held_out}
        for name, part in parts.items():
            if part.made_from["with"] != self._key or part.made_from != {**train.made_from, "part": name}:
                return None
        if train.made_from["stamp"] != stamp_of(self._paths) and train.made_from["content"] != digest_of(self._paths):
            return None
        return SourceFiles(self._source, train, held_out)

    def _write(self) -> None:
        stamp = stamp_of(self._paths)  # before anything is read: what changes meanwhile is noticed the next time
        reader = SourceReader(self._paths, self._source)
        encoder = Encoder(self._text.tokenizer, self._text.template, self._fim_rate, self._options.held_out)
        kinds: list[str] = []
        paths = [self._train, self._held_out] if self._options.held_out else [self._train]
        with ExitStack() as stack:
            parts = [stack.enter_context(token_file.write(path, self._text.tokenizer.size)) for path in paths]
            for one in encoder.encode(self._checked(reader, kinds)):
                parts[one.held_out].add(one.ids, one.learned, one.utf8_bytes, one.origin)
            made_from = {"with": self._key, "stamp": stamp, "content": reader.digest, "kind": kinds[0]}
            for part, name in zip(parts, (TRAIN, HELD_OUT), strict=False):
                part.made_from.update(made_from, skipped=dict(reader.skipped), part=name)

    def _checked(self, reader: SourceReader, kinds: list[str]) -> Iterator[Document]:
        """The documents, all of one kind, which goes into `kinds`; says on the way how far it is."""
        total = sum(path.stat().st_size for path in self._paths)
        for document in reader.documents():
            kind = CHATS if isinstance(document, ChatDocument) else TEXTS
            if kind not in kinds and kinds:
                says = f"one of {kind} in a source that began with {kinds[0]}"
                hint = "make it a source of its own"
                raise DataError(says, file=document.origin.file, line=document.origin.line or None, hint=hint)
            kinds[:] = [kind]
            yield document
            if self._progress is not None:
                self._progress(reader.bytes_read, total, self._source.path)
        if not kinds:
            left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(reader.skipped.items()))
            raise DataError(f"there is no document ({left_out} left out)", file=self._source.path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process writes into the folder. The lock ends with the process that holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / LOCK).open("wb")
        fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", file=folder) from error
    with stream:
        yield
