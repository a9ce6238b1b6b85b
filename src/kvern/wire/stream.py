"""OpenAI's streams, as server-sent events.

    chat: a role chunk a choice, chunks of reasoning, text and calls, a finish chunk a choice, (usage chunk, when asked
        for), [DONE]
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
from kvern.text.events import CallArguments, CallStart, Content, Event, Piece, Reasoning
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
    """Builds the events of one chat answer. `thinks`: it begins with reasoning, as DeepSeek's streams show it."""

    head: Head
    include_usage: bool
    logprobs: bool
    thinks: bool = False

    def start(self, index: int) -> bytes:
        """The first event of a choice, which names the role."""
        empty = {"content": None, "reasoning_content": ""} if self.thinks else {"content": ""}
        return self._choice(index, {"role": "assistant", **empty}, None, None)

    def piece(self, index: int, piece: Piece) -> bytes:
        """The events of a piece, and the end where it has one; nothing for an empty piece.

        Log-probabilities leave with the first of them: they belong to the text that the model wrote, markup included.
        """
        deltas = [delta for event in piece.events if (delta := self._delta(event))]
        logprobs = ChoiceLogprobs.of(piece.scores).model_dump() if self.logprobs and piece.scores else None
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        events = [self._choice(index, delta, None if at else logprobs, None) for at, delta in enumerate(deltas)]
        if piece.finish_reason is not None:
            events.append(self._choice(index, {}, None, piece.finish_reason))
        return b"".join(events)

    def finish(self, usage: Usage) -> bytes:
        """The last events, [DONE] included."""
        return (self._chunk([], usage.model_dump()) if self.include_usage else b"") + DONE

    def _delta(self, event: Event) -> dict[str, Any]:
        if isinstance(event, Content):
            return {"content": event.text, "reasoning_content": None} if self.thinks else {"content": event.text}
        if isinstance(event, Reasoning):
            return {"content": None, "reasoning_content": event.text, "reasoning": event.text}
        if isinstance(event, CallStart):
            function = {"name": event.name, "arguments": ""}
            return {"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}
        if isinstance(event, CallArguments):
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        return {}

    def _choice(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: FinishReason | None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._chunk([choice], None)

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        return chat_chunk(self.head, choices, usage, self.include_usage)


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


def chat_chunk(head: Head, choices: list[dict[str, Any]], usage: dict[str, Any] | None, include_usage: bool) -> bytes:
    """One chunk of a chat answer; `usage`, which may be null, shows where it was asked for."""
    return _chunk(head, "chat.completion.chunk", choices, usage, include_usage)


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
