"""OpenAI's stream of a chat completion, as server-sent events.

    role chunk, text chunks, finish chunk, (usage chunk with no choices, when asked for), [DONE]

With `include_usage` every earlier chunk carries `"usage": null`, as OpenAI's do. An error in the middle becomes an
event whose data has `error`, which clients raise; no [DONE] follows it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kvern.errors import KvernError
from kvern.text.messages import FinishReason
from kvern.wire.openai import Usage, error_body

DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event of one JSON object."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def error_event(error: KvernError) -> bytes:
    """The event that ends a stream that failed."""
    return event(error_body(error).model_dump())


@dataclass(frozen=True)
class ChatStream:
    """Builds the events of one answer; `id`, `created` and `model` are the same in all of them."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    include_usage: bool

    def start(self) -> bytes:
        """The first event, which names the role."""
        return self._choice({"role": "assistant", "content": ""}, None)

    def text(self, piece: str) -> bytes:
        """A piece of the answer."""
        return self._choice({"content": piece}, None)

    def finish(self, reason: FinishReason, usage: Usage) -> bytes:
        """The last events, [DONE] included."""
        end = self._choice({}, reason)
        return end + (self._chunk([], usage.model_dump()) if self.include_usage else b"") + DONE

    def _choice(self, delta: dict[str, Any], reason: FinishReason | None) -> bytes:
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}], None)

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        chunk = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
        }
        return event({**chunk, "usage": usage} if self.include_usage else chunk)
