"""Anthropic's stream: named events about blocks of content.

    message_start, (content_block_start, content_block_delta*, content_block_stop)*, message_delta, message_stop

A block is text, thinking or one call; a ping follows the start of the first. `message_start` already tells how much of
the prompt the prefix cache held, so it comes with the first piece; what is sent while a request waits before that is a
comment, afterwards a ping. An error becomes an `error` event, and nothing follows it.
"""

from __future__ import annotations

import json
from typing import Any

from kvern.errors import KvernError
from kvern.text.events import CallArguments, CallEnd, CallStart, Content, Event, Piece
from kvern.wire.answers import Usage
from kvern.wire.anthropic_answers import AnthropicMessage, MessageUsage, anthropic_error_body, stop_reason
from kvern.wire.stream import KEEP_ALIVE


def event(name: str, **data: Any) -> bytes:
    """One server-sent event; its name is also the data's `type`."""
    text = json.dumps({"type": name, **data}, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n".encode()


PING = event("ping")


class MessageStream:
    """Builds the events of one answer.

    `room`: the tokens after which the context is full, where that comes before max_tokens; `edited`: whether to say
    that no edit of the context was applied.
    """

    def __init__(
        self,
        *,
        id: str,
        model: str,
        prompt_tokens: int,
        room: int | None = None,
        omit_thinking: bool = False,
        edited: bool = False,
    ) -> None:
        self._id = id
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._room = room
        self._omit_thinking = omit_thinking
        self._edited = edited
        self._cached: int | None = None
        self._drawn = 0
        self._index = -1  # of the newest block
        self._open: str | None = None  # its kind, until it is stopped
        self._last: Piece | None = None

    def start(self, index: int) -> bytes:
        """Nothing: the message starts with its first piece."""
        return b""

    def piece(self, index: int, piece: Piece) -> bytes:
        """The events of a piece."""
        events = b"" if self._cached is not None else self._begin(piece.cached_tokens)
        self._drawn += len(piece.token_ids)
        events += b"".join(self._event(one) for one in piece.events)
        if piece.finish_reason is not None:
            self._last = piece
        return events

    def finish(self, usage: Usage) -> bytes:
        """The last events: why the answer ended, and what it used."""
        assert self._last is not None
        reason, stopped_by = self._last.finish_reason, self._last.stopped_by
        assert reason is not None
        why = stop_reason(reason, stopped_by, full=self._drawn == self._room)
        used = MessageUsage.of(self._prompt_tokens, self._cached or 0, self._drawn).model_dump()
        more: dict[str, Any] = {"context_management": {"applied_edits": []}} if self._edited else {}
        delta = {"stop_reason": why, "stop_sequence": stopped_by}
        return self._stop() + event("message_delta", delta=delta, usage=used, **more) + event("message_stop")

    def keep_alive(self) -> bytes:
        """What is sent where nothing else is."""
        return KEEP_ALIVE if self._cached is None else PING

    def error(self, error: KvernError) -> bytes:
        """What ends a stream that failed."""
        return event("error", **anthropic_error_body(error).model_dump(exclude={"type", "request_id"}))

    def _begin(self, cached_tokens: int) -> bytes:
        self._cached = cached_tokens
        usage = MessageUsage.of(self._prompt_tokens, cached_tokens, 0)
        message = AnthropicMessage(
            id=self._id, model=self._model, content=[], stop_reason=None, stop_sequence=None, usage=usage
        )
        return event("message_start", message=message.model_dump())

    def _event(self, one: Event) -> bytes:
        if isinstance(one, CallStart):
            return self._block("tool_use", id=one.id, name=one.name, input={})
        if isinstance(one, CallArguments):
            return self._delta("input_json_delta", partial_json=one.text) if one.text else b""
        if isinstance(one, CallEnd):
            return self._stop()
        if not one.text:
            return b""
        if isinstance(one, Content):
            return self._within("text", text="") + self._delta("text_delta", text=one.text)
        started = self._within("thinking", thinking="", signature="")
        return started if self._omit_thinking else started + self._delta("thinking_delta", thinking=one.text)

    def _within(self, kind: str, **empty: Any) -> bytes:
        return b"" if self._open == kind else self._block(kind, **empty)

    def _block(self, kind: str, **empty: Any) -> bytes:
        events = self._stop()
        self._index += 1
        self._open = kind
        events += event("content_block_start", index=self._index, content_block={"type": kind, **empty})
        return events + PING if self._index == 0 else events

    def _delta(self, kind: str, **delta: Any) -> bytes:
        return event("content_block_delta", index=self._index, delta={"type": kind, **delta})

    def _stop(self) -> bytes:
        """End the block that is open; thinking is signed."""
        if self._open is None:
            return b""
        signed = self._delta("signature_delta", signature=self._id) if self._open == "thinking" else b""
        self._open = None
        return signed + event("content_block_stop", index=self._index)
