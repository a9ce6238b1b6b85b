"""OpenAI's streams, as server-sent events.

    chat: a role chunk a choice, text chunks, a finish chunk a choice, (usage chunk, when asked for), [DONE]
    completions: the same without role chunks

With `include_usage` every earlier chunk carries `"usage": null`, as OpenAI's do. An error in the middle becomes an
event whose data has `error`, which clients raise; no [DONE] follows it. Comments, which clients skip, may come anywhere
before the end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kvern.errors import KvernError
from kvern.text.events import Content, Piece
from kvern.text.messages import FinishReason
from kvern.wire.answers import Usage, error_body
from kvern.wire.chat import ChoiceLogprobs
from kvern.wire.completions import CompletionLogprobs

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, sent where nothing else is."""


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event of one JSON object."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def error_event(error: KvernError) -> bytes:
    """The event that ends a stream that failed."""
    return event(error_body(error).model_dump())


@dataclass(frozen=True)
class Head:
    """What all chunks of one answer share."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class OpenAIStream:
    """What the streams of both routes do alike."""

    def keep_alive(self) -> bytes:
        """What is sent where nothing else is."""
        return KEEP_ALIVE

    def error(self, error: KvernError) -> bytes:
        """What ends a stream that failed."""
        return error_event(error)


@dataclass(frozen=True)
class ChatStream(OpenAIStream):
    """Builds the events of one chat answer."""

    head: Head
    include_usage: bool
    logprobs: bool

    def start(self, index: int) -> bytes:
        """The first event of a choice, which names the role."""
        return self._choice(index, {"role": "assistant", "content": ""}, None, None)

    def piece(self, index: int, piece: Piece) -> bytes:
        """The events of a piece: its text, and the end where it has one; nothing for an empty piece."""
        text = "".join(event.text for event in piece.events if isinstance(event, Content))
        logprobs = ChoiceLogprobs.of(piece.scores).model_dump() if self.logprobs and piece.scores else None
        events = self._choice(index, {"content": text}, logprobs, None) if text or logprobs else b""
        return events if piece.finish_reason is None else events + self._choice(index, {}, None, piece.finish_reason)

    def finish(self, usage: Usage) -> bytes:
        """The last events, [DONE] included."""
        return (self._chunk([], usage.model_dump()) if self.include_usage else b"") + DONE

    def _choice(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: FinishReason | None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._chunk([choice], None)

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        return _chunk(self.head, "chat.completion.chunk", choices, usage, self.include_usage)


@dataclass(frozen=True)
class CompletionStream(OpenAIStream):
    """Builds the events of one completion. `prompts`: the echoed text of each choice, "" where there is no echo."""

    head: Head
    include_usage: bool
    logprobs: bool
    prompts: tuple[str, ...]

    def start(self, index: int) -> bytes:
        """The echoed prompt; where it is scored, it comes with the first piece instead."""
        prompt = self.prompts[index]
        return self._choice(index, prompt, None, None) if prompt and not self.logprobs else b""

    def piece(self, index: int, piece: Piece) -> bytes:
        """The events of a piece: the scored prompt, the text; nothing for an empty piece."""
        prompt, events, scores = self.prompts[index], b"", piece.scores
        if self.logprobs and piece.prompt_scores:
            events = self._choice(index, prompt, CompletionLogprobs.of(piece.prompt_scores, 0).model_dump(), None)
        logprobs = CompletionLogprobs.of(scores, len(prompt)).model_dump() if self.logprobs and scores else None
        if piece.text or logprobs or piece.finish_reason:
            events += self._choice(index, piece.text, logprobs, piece.finish_reason)
        return events

    def finish(self, usage: Usage) -> bytes:
        """The last events, [DONE] included."""
        return (self._chunk([], usage.model_dump()) if self.include_usage else b"") + DONE

    def _choice(self, index: int, text: str, logprobs: dict[str, Any] | None, reason: FinishReason | None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return self._chunk([choice], None)

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        return _chunk(self.head, "text_completion", choices, usage, self.include_usage)


def _chunk(
    head: Head, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None, include_usage: bool
) -> bytes:
    chunk = {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
        "choices": choices,
    }
    return event({**chunk, "usage": usage} if include_usage else chunk)
