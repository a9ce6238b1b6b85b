"""What goes into a chat and what comes out of it, whichever way it arrives (Python, HTTP, command line).

These are plain values: `wire` translates its bodies into them, `text.template` renders them, `llm` and `client` return
them. How to sample is in `text.options`. A field that is None is absent, so a template that asks
`'tool_calls' in message` gets the answer it expects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

from kvern.errors import BadRequestError

JSON: TypeAlias = Mapping[str, Any]
Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Tool:
    """A function that the model may ask for. `parameters`: the JSON schema of its arguments, {} if it takes none.

    `strict`: the arguments must match the schema.
    """

    name: str
    description: str | None
    parameters: JSON
    strict: bool = False


@dataclass(frozen=True)
class NamedTool:
    """The choice of one tool, which the model must call."""

    name: str


ToolChoice: TypeAlias = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for. `arguments`: JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn. `content` is None only for an assistant turn that consists of tool calls."""

    role: Role
    content: str | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def as_template_value(self) -> dict[str, Any]:
        """Return the dictionary that chat templates read: `content` always, other fields only where they are set."""
        value: dict[str, Any] = {"role": self.role, "content": self.content}
        optional = ("name", "tool_call_id", "reasoning_content")
        value.update({key: given for key in optional if (given := getattr(self, key)) is not None})
        if self.tool_calls:
            value["tool_calls"] = [_call_value(call) for call in self.tool_calls]
        return value


MessageLike: TypeAlias = Message | Mapping[str, Any]


@dataclass(frozen=True)
class TokenScore:
    """A token as text and bytes (which may be part of a character), and its natural log-probability.

    The first token of a prompt has none.
    """

    text: str
    raw: bytes
    logprob: float | None


@dataclass(frozen=True)
class ScoredToken(TokenScore):
    """A token of an answer or a prompt, with the best alternatives (best first, the token itself may be among them).

    `offset`: where its text begins, in characters of the answer (of the prompt). `ends`: it ended the answer and does
    not show.
    """

    top: tuple[TokenScore, ...]
    offset: int
    ends: bool = False


@dataclass(frozen=True)
class Completion:
    """A finished answer. `token_ids` holds every generated id, the stopping one included; `text` ends before it.

    `text` is all that the model wrote, markup included; `content`, `reasoning` and `tool_calls` are what it means.
    `token_ids` is empty where the answer came from a server that sends text only; `completion_tokens` counts anyway.
    `scores` and `prompt_scores` are filled where log-probabilities were asked for. `stopped_by`: the stop string that
    ended the answer, where one did.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    scores: tuple[ScoredToken, ...] = ()
    prompt_scores: tuple[ScoredToken, ...] = ()
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    stopped_by: str | None = None


def as_messages(messages: str | Sequence[MessageLike]) -> list[Message]:
    """Read a conversation from Message objects, dictionaries, or one string (a single user turn).

    Raises BadRequestError naming the message and the field.
    """
    if isinstance(messages, str):
        return [Message("user", messages)]
    if not messages:
        raise BadRequestError("messages must hold at least one message", param="messages")
    return [_as_message(index, message) for index, message in enumerate(messages)]


def _as_message(index: int, message: MessageLike) -> Message:
    if isinstance(message, Message):
        return message
    known = {field.name for field in fields(Message)}
    for key in message:
        if key not in known:
            raise BadRequestError(f"unknown message field {key!r}", param=f"messages.{index}.{key}")
    if message.get("role") not in ROLES:
        raise BadRequestError(
            f"role must be one of {', '.join(ROLES)}, not {message.get('role')!r}", param=f"messages.{index}.role"
        )
    calls, content = _as_calls(index, message.get("tool_calls")), message.get("content")
    if not isinstance(content, str) and not (content is None and calls):
        raise BadRequestError(f"content must be text, not {content!r}", param=f"messages.{index}.content")
    return Message(**{**message, "tool_calls": calls})


def _as_calls(index: int, calls: Any) -> tuple[ToolCall, ...]:
    where = f"messages.{index}.tool_calls"
    try:
        return tuple(call if isinstance(call, ToolCall) else _as_call(call) for call in calls or ())
    except (KeyError, TypeError) as error:
        hint = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
        raise BadRequestError("tool_calls must hold calls of functions", hint=hint, param=where) from error


def _as_call(call: JSON) -> ToolCall:
    function = call["function"]
    if not all(isinstance(part, str) for part in (call["id"], function["name"], function["arguments"])):
        raise TypeError
    return ToolCall(call["id"], function["name"], function["arguments"])


def _call_value(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
