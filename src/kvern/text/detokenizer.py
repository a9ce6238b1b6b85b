"""Incremental detokenising that never shows half a character.

Concatenating the pieces gives exactly `Tokenizer.decode` of all ids. A piece is the difference between decoding the ids
since the last clean boundary with and without the new ones. Two things are held back:

- a last U+FFFD, which is what an unfinished UTF-8 sequence decodes to (earlier ones can no longer change);
- everything since the boundary while the last token is a byte token (`<0xE4>`), because decoders with byte fallback
  read a run of such tokens as a whole, and one wrong byte turns the run into replacement characters.

The cost: a real U+FFFD, and the last character of a byte run, are shown one token late.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvern.text.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns one sequence of ids into text, piece by piece.

    Special tokens do not appear in the text, except those of `shown`: markup that a parser has to see.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        ids = {tokenizer.control[text]: text for text in shown if text in tokenizer.control}
        self._marks = {token_id: text for token_id, text in ids.items() if not tokenizer.is_visible(token_id)}
        self._context: list[
            int
        ] = []  # the ids before the boundary, so that a leading space is decoded as in the middle
        self._pending: list[int] = []  # the ids after it
        self._shown = 0  # characters of the pending ids' text that were returned already

    def push(self, token_id: int) -> str:
        """Add one id; return the text that became certain, often empty."""
        if token_id in self._marks:
            text = self.finish() + self._marks[token_id]
            self._context, self._pending, self._shown = [], [], 0
            return text
        if not self._tokenizer.is_visible(token_id):
            return ""
        self._pending.append(token_id)
        if self._tokenizer.is_byte_token(token_id):
            return ""
        text = self._pending_text()
        if text.endswith(REPLACEMENT):
            return self._show(text[:-1])
        piece = self._show(text)
        self._context, self._pending, self._shown = self._pending, [], 0
        return piece

    def finish(self) -> str:
        """Return the rest, an unfinished character included (as U+FFFD, as `decode` shows it)."""
        return self._show(self._pending_text())

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]

    def _show(self, text: str) -> str:
        piece = text[self._shown :]
        self._shown += len(piece)
        return piece
