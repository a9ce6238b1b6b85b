"""Documents become token ids, many at a time: texts, some of them rearranged for fill-in-the-middle, and chats.

    [start] text [end of text]

Texts begin as every prompt of serving begins (`Tokenizer.adds_bos`) and end with the tokenizer's end of text. Strings
like `<|im_end|>` in them stay text. Memory: about 110 bytes for each byte of a batch, which is 1 MiB of documents, or
one larger document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvern.data import fim
from kvern.data.chat_rows import chat_rows
from kvern.data.sources import ChatDocument, Document, TextDocument
from kvern.data.token_file import Origin
from kvern.errors import BadRequestError, ConfigError, DataError
from kvern.text.fim import FAMILIES, FillInTheMiddle
from kvern.text.template import ChatTemplate
from kvern.text.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20
WORD = 1 << 64


@dataclass(frozen=True)
class Encoded:
    """A document's ids, what of them is learned (None: all), the UTF-8 bytes of the text that is learned."""

    ids: list[int]
    learned: list[bool] | None
    utf8_bytes: int
    held_out: bool
    origin: Origin


class Encoder:
    """Makes ids of documents. Raises ConfigError for a tokenizer that lacks a token that is needed."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, fim_rate: float = 0.0, held_out: float = 0.0
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._fim_rate, self._held_out = fim_rate, held_out
        self._fim = FillInTheMiddle.of(tokenizer)
        bos = tokenizer.bos_id
        self._start = [bos] if tokenizer.adds_bos and bos is not None else []
        self._control = frozenset(tokenizer.control.values())

    def encode(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """In their order; a chat may become several. Raises DataError, with file and line, for what cannot be shown."""
        batch: list[TextDocument] = []
        size = 0
        for document in documents:
            if isinstance(document, ChatDocument):
                yield from self._chat(document)
                continue
            batch.append(document)
            size += len(document.content)
            if size >= BATCH_BYTES:
                yield from self._texts(batch)
                batch, size = [], 0
        yield from self._texts(batch)

    def _texts(self, batch: list[TextDocument]) -> Iterator[Encoded]:
        if not batch:
            return
        end = self._end_of_text()
        held = [self._is_held_out(document.content) for document in batch]
        cuts = [
            None if out else fim.cut(document.text, self._fim_rate) for document, out in zip(batch, held, strict=True)
        ]
        parts = [cut or (document.text,) for document, cut in zip(batch, cuts, strict=True)]
        ids = iter(self._tokenizer.encode_batch([part for several in parts for part in several]))
        for document, out, cut in zip(batch, held, cuts, strict=True):
            body = next(ids) if cut is None else self._rearranged(next(ids), next(ids), next(ids))
            yield Encoded([*self._start, *body, end], None, len(document.content), out, document.origin)

    def _rearranged(self, prefix: list[int], middle: list[int], suffix: list[int]) -> list[int]:
        assert self._fim is not None
        return self._fim.arrange(prefix, suffix) + middle

    def _end_of_text(self) -> int:
        if self._fim is None and self._fim_rate:
            hint = f"set fim_rate to 0, or add {' '.join(FAMILIES[-1])}"
            raise ConfigError("the tokenizer has no fill-in-the-middle tokens", hint=hint, param="fim_rate")
        if self._tokenizer.eos_id is None:
            raise ConfigError("the tokenizer names no eos_token, which ends a text")
        return self._tokenizer.eos_id

    def _chat(self, document: ChatDocument) -> Iterator[Encoded]:
        origin = document.origin
        if self._template is None:
            says = "a chat, but the tokenizer comes without a chat template"
            raise DataError(says, file=origin.file, line=origin.line)
        held_out = self._is_held_out(document.content)
        try:
            for row in chat_rows(document.conversation, self._template, self._tokenizer):
                yield Encoded(row.ids, row.learned, self._text_bytes(row.ids, row.learned), held_out, origin)
        except BadRequestError as error:
            says = f"{error.param}: {error.message}" if error.param else error.message
            raise DataError(says, file=origin.file, line=origin.line, hint=error.hint) from error

    def _text_bytes(self, ids: list[int], learned: list[bool]) -> int:
        """Of what is learned; control tokens are no text."""
        answers = [one for one, mark in zip(ids, learned, strict=True) if mark and one not in self._control]
        return sum(len(self._tokenizer.token_bytes(one)) for one in answers)

    def _is_held_out(self, content: bytes) -> bool:
        digest = hashlib.blake2b(content, digest_size=8, person=b"kvern held out").digest()
        return int.from_bytes(digest, "little") < self._held_out * WORD
