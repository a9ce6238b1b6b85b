"""Anthropic's answers: a message of blocks, its usage, counts of tokens, models, and its envelope of errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel

from kvern.errors import ContextLengthError, KvernError
from kvern.text.messages import Completion
from kvern.wire.answers import sendable

ERROR_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class MessageUsage(BaseModel):
    """Tokens of a request. `input_tokens` are those of the prompt that the prefix cache did not hold."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    service_tier: Literal["standard"] = "standard"

    @classmethod
    def of(cls, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> MessageUsage:
        """Build from the three counts."""
        return cls(
            input_tokens=prompt_tokens - cached_tokens,
            cache_read_input_tokens=cached_tokens,
            output_tokens=output_tokens,
        )


class AnswerBlock(BaseModel):
    """A part of an answer."""


class TextAnswer(AnswerBlock):
    """Text."""

    type: Literal["text"] = "text"
    text: str


class ThinkingAnswer(AnswerBlock):
    """What the model thought. Clients send the block back with its signature, which here is the message's id."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str


class ToolUseAnswer(AnswerBlock):
    """A call that the client is to run."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


class AnthropicMessage(BaseModel):
    """The answer to a request that does not stream."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextAnswer | ThinkingAnswer | ToolUseAnswer]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class ContextManagement(BaseModel):
    """Which edits of the context were applied: none."""

    applied_edits: list[dict[str, Any]] = []


class EditedMessage(AnthropicMessage):
    """The answer to a request that asked for edits of the context."""

    context_management: ContextManagement = ContextManagement()


class TokenCount(BaseModel):
    """The answer to POST /v1/messages/count_tokens."""

    input_tokens: int


class AnthropicModel(BaseModel):
    """A served model, as clients of Anthropic's API read it."""

    type: Literal["model"] = "model"
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int
    max_tokens: int

    @classmethod
    def of(cls, name: str, created: int, context: int) -> AnthropicModel:
        """`created`: seconds since the epoch; `context`: prompt and answer together, in tokens."""
        when = datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return cls(id=name, display_name=name, created_at=when, max_input_tokens=context, max_tokens=context)


class AnthropicModelList(BaseModel):
    """The answer to GET /v1/models."""

    data: list[AnthropicModel]
    has_more: bool = False
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, models: list[AnthropicModel]) -> AnthropicModelList:
        """All models on one page."""
        return cls(data=models, first_id=models[0].id, last_id=models[-1].id)


class AnthropicErrorDetail(BaseModel):
    """What went wrong; the field's path is in the message."""

    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    """The one envelope of errors."""

    type: Literal["error"] = "error"
    error: AnthropicErrorDetail
    request_id: str | None


def anthropic_error_body(error: KvernError, request_id: str | None = None) -> AnthropicErrorBody:
    """Put an error into the envelope."""
    default = "api_error" if error.status >= 500 else "invalid_request_error"
    detail = AnthropicErrorDetail(type=ERROR_TYPES.get(error.status, default), message=_message(error))
    return AnthropicErrorBody(error=detail, request_id=request_id)


def message_of(answer: Completion, *, id: str, model: str, room: int | None, omit_thinking: bool) -> AnthropicMessage:
    """An answer as one body. `room`: the tokens after which the context is full, where that comes before max_tokens."""
    blocks: list[TextAnswer | ThinkingAnswer | ToolUseAnswer] = []
    if answer.reasoning:
        blocks.append(ThinkingAnswer(thinking="" if omit_thinking else answer.reasoning, signature=id))
    if answer.content:
        blocks.append(TextAnswer(text=answer.content))
    blocks += [ToolUseAnswer(id=call.id, name=call.name, input=arguments(call.arguments)) for call in answer.tool_calls]
    reason = stop_reason(answer.finish_reason, answer.stopped_by, full=answer.completion_tokens == room)
    usage = MessageUsage.of(answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens)
    return AnthropicMessage(
        id=id, model=model, content=blocks, stop_reason=reason, stop_sequence=answer.stopped_by, usage=usage
    )


def arguments(text: str) -> dict[str, Any]:
    """A call's arguments. Where the answer was cut in the middle of them there is no object; the text is kept then."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"arguments": text}


def stop_reason(finish: str, stopped_by: str | None, *, full: bool) -> StopReason:
    """Why an answer ended. `full`: the context was, before max_tokens came."""
    if stopped_by is not None:
        return "stop_sequence"
    if finish == "length":
        return "model_context_window_exceeded" if full else "max_tokens"
    return "tool_use" if finish == "tool_calls" else "end_turn"


def _message(error: KvernError) -> str:
    """One line that names the field. Clients know a prompt that is too long by Anthropic's own words."""
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    if isinstance(error, ContextLengthError):
        return f"prompt is too long: {error.tokens} tokens > {error.limit} maximum"
    named = error.param is None or error.param in message
    return sendable(message if named else f"{error.param}: {message}")
