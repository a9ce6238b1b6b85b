"""Documents from files: a file is one, or each line of a JSONL file is

    {"text": "..."}    or    {"messages": [...], "tools": [...]}, with OpenAI's names

Whatever is not that is refused with its file and line; `skip` makes an exception for empty and binary files only, and
counts them. Memory: one document. What this gives up: a document has at most 16 MiB.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field

from kvern.data.files import heading, naming
from kvern.data.options import SourceOptions
from kvern.data.token_file import Origin
from kvern.errors import BadRequestError, DataError
from kvern.text.conversation import Conversation
from kvern.wire.chat import MAX_TOOLS, RequestMessage, ToolDefinition
from kvern.wire.fields import Strict
from kvern.wire.reading import read

MAX_DOCUMENT_BYTES = 16 << 20
"""Tokenising takes about 110 bytes of memory for each of them."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ROW_KINDS = ("text", "messages")


@dataclass(frozen=True)
class TextDocument:
    """A text, with its characters exactly as they are."""

    text: str
    origin: Origin

    @cached_property
    def content(self) -> bytes:
        """What its hash is made of."""
        return self.text.encode()


@dataclass(frozen=True)
class ChatDocument:
    """A conversation that ends with an answer."""

    conversation: Conversation
    content: bytes
    origin: Origin


Document = TextDocument | ChatDocument


class ChatRow(Strict):
    """A line of a file of chats."""

    messages: list[RequestMessage] = Field(min_length=1, fail_fast=True)
    tools: list[ToolDefinition] = Field(default=[], max_length=MAX_TOOLS, fail_fast=True)


class SourceReader:
    """Reads the documents of files once.

    bytes_read: so far. skipped: files left out, by reason. digest: of what has been read, equal to `digest_of` at the
    end.
    """

    def __init__(self, files: Sequence[Path], options: SourceOptions) -> None:
        self._files = files
        self._options = options
        self._hash = hashlib.sha256()
        self.bytes_read = 0
        self.skipped: Counter[str] = Counter()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def documents(self) -> Iterator[Document]:
        """One after the other. Raises DataError, with file and line, for what is no document."""
        for path in self._files:
            self._hash.update(heading(path))
            is_rows = path.suffix == ".jsonl" if self._options.format == "auto" else self._options.format == "jsonl"
            yield from self._rows(path) if is_rows else self._text(path)

    def _text(self, path: Path) -> Iterator[TextDocument]:
        with naming(path), path.open("rb") as stream:
            raw = stream.read(MAX_DOCUMENT_BYTES + 1)
        self._count(raw)
        if len(raw) > MAX_DOCUMENT_BYTES:
            says = f"a document has at most {MAX_DOCUMENT_BYTES >> 20} MiB, and this file has more"
            raise DataError(says, file=path, hint="split it, or make it JSONL with a document a line")
        text = _decode(raw)
        if text is None:
            self._refuse_or_skip("binary", "not UTF-8 text", path)
        elif not text.strip():
            self._refuse_or_skip("empty", "empty", path)
        else:
            yield TextDocument(text, Origin(str(path)))

    def _refuse_or_skip(self, reason: str, says: str, path: Path) -> None:
        if not self._options.skip:
            raise DataError(says, file=path, hint="name it in exclude, or set skip for the source")
        self.skipped[reason] += 1

    def _rows(self, path: Path) -> Iterator[Document]:
        rows = 0
        with naming(path), path.open("rb") as stream:
            for number, raw in enumerate(iter(lambda: stream.readline(MAX_DOCUMENT_BYTES + 1), b""), 1):
                self._count(raw)
                if len(raw) > MAX_DOCUMENT_BYTES:
                    raise DataError(f"a line has at most {MAX_DOCUMENT_BYTES >> 20} MiB", file=path, line=number)
                if line := (raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw).strip():
                    yield parse_row(line, Origin(str(path), number))
                    rows += 1
        if not rows:
            self._refuse_or_skip("empty", "empty", path)

    def _count(self, raw: bytes) -> None:
        self._hash.update(raw)
        self.bytes_read += len(raw)


def parse_row(line: bytes, origin: Origin) -> Document:
    """A document from a line of JSON. Raises DataError."""
    row = _object(line, origin)
    kinds = [kind for kind in ROW_KINDS if kind in row]
    if len(kinds) != 1:
        says = "has both text and messages" if kinds else "has neither text nor messages"
        _refuse(says, origin, hint='a row is {"text": ...} or {"messages": [...], "tools": [...]}')
    return _text_row(row, origin) if kinds[0] == "text" else _chat_row(row, origin)


def _text_row(row: dict[str, Any], origin: Origin) -> TextDocument:
    text = row.pop("text")
    if row:
        _refuse(f"unknown key {next(iter(row))!r}", origin, hint="a row of text has the key text alone")
    if not isinstance(text, str):
        _refuse(f"text must be a string, not {_kind(text)}", origin)
    if not text.strip():
        _refuse("text is empty", origin)
    if any("\ud800" <= character <= "\udfff" for character in text):
        _refuse("text holds half of a surrogate pair, which is no character", origin)
    return TextDocument(text, origin)


def _chat_row(row: dict[str, Any], origin: Origin) -> ChatDocument:
    content = json.dumps(row, sort_keys=True).encode()
    try:
        parsed = read(ChatRow, row, {"messages": RequestMessage, "tools": ToolDefinition})
        if any(message.prefix for message in parsed.messages):
            raise BadRequestError("prefix belongs into requests, not into what is trained on")
        messages = tuple(message.to_message() for message in parsed.messages)
        conversation = Conversation(messages, tuple(tool.to_tool() for tool in parsed.tools))
        conversation.check()
    except BadRequestError as error:
        raise DataError(error.message, file=origin.file, line=origin.line, hint=error.hint) from error
    return ChatDocument(conversation, content, origin)


def _object(line: bytes, origin: Origin) -> dict[str, Any]:
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise DataError("nested too deeply", file=origin.file, line=origin.line) from error
    except ValueError as error:  # malformed JSON or UTF-8, integers beyond any use
        raise DataError(f"not JSON: {error}", file=origin.file, line=origin.line) from error
    if not isinstance(value, dict):
        _refuse(f"a row must be a JSON object, not {_kind(value)}", origin)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _refuse(says: str, origin: Origin, hint: str | None = None) -> NoReturn:
    raise DataError(says, file=origin.file, line=origin.line, hint=hint)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _decode(raw: bytes) -> str | None:
    """The text, without a byte order mark; None where it is none."""
    if b"\0" in raw:
        return None
    try:
        return raw.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError:
        return None
