"""What DeepSeek's own API does differently from OpenAI's: names that say whether to think, and where usage comes.

    chat: a role chunk a choice, chunks, then a finish chunk a choice, the last of them with usage, [DONE]

Usage comes whether or not it was asked for; with `include_usage` the earlier chunks carry `"usage": null`, and no chunk
without choices follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kvern.text.events import Piece
from kvern.text.messages import FinishReason
from kvern.wire.answers import Usage
from kvern.wire.stream import DONE, ChatStream, Head, OpenAIStream, chat_chunk

THINKS: Mapping[str, bool] = {"deepseek-chat": False, "deepseek-reasoner": True}
"""DeepSeek's names, and whether the model thinks under them."""


class DeepSeekStream(OpenAIStream):
    """Builds the events of one chat answer."""

    def __init__(self, head: Head, include_usage: bool, logprobs: bool, thinks: bool) -> None:
        self._head = head
        self._include_usage = include_usage
        self._chat = ChatStream(head, include_usage, logprobs, thinks)
        self._reasons: dict[int, FinishReason] = {}

    def start(self, index: int) -> bytes:
        """The first event of a choice, which names the role."""
        return self._chat.start(index)

    def piece(self, index: int, piece: Piece) -> bytes:
        """The events of a piece; its end is kept back until the usage is known."""
        if piece.finish_reason is not None:
            self._reasons[index] = piece.finish_reason
        return self._chat.piece(index, replace(piece, finish_reason=None))

    def finish(self, usage: Usage) -> bytes:
        """The ends of the choices, usage with the last, and [DONE]."""
        *others, last = sorted(self._reasons)
        ends = [self._end(index, None, self._include_usage) for index in others]
        return b"".join((*ends, self._end(last, usage, True), DONE))

    def _end(self, index: int, usage: Usage | None, shows_usage: bool) -> bytes:
        choice = {
            "index": index,
            "delta": {"content": "", "reasoning_content": None} if self._chat.thinks else {"content": ""},
            "logprobs": None,
            "finish_reason": self._reasons[index],
        }
        return chat_chunk(self._head, [choice], None if usage is None else usage.model_dump(), shows_usage)
