"""What goes into a chat and what comes out of it, whichever way it arrives (Python, HTTP, command line).

These are plain values: `wire` translates its bodies into them, `text.template` renders them, `llm` and `client` return
them. A field that is None is absent, so a template that asks `'tool_calls' in message` gets the answer it expects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

from kvern.errors import BadRequestError

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
FinishReason: TypeAlias = Literal["stop", "length"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn. `content` is None only for an assistant turn that consists of tool calls."""

    role: Role
    content: str | None = None
    name: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def as_template_value(self) -> dict[str, Any]:
        """Return the dictionary that chat templates read: `content` always, other fields only where they are set."""
        value: dict[str, Any] = {"role": self.role, "content": self.content}
        optional = ("name", "tool_call_id", "reasoning_content")
        value.update({key: given for key in optional if (given := getattr(self, key)) is not None})
        if self.tool_calls is not None:
            value["tool_calls"] = [dict(call) for call in self.tool_calls]
        return value


MessageLike: TypeAlias = Message | Mapping[str, Any]


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens, and when to end.

    `max_tokens` None: up to the end of the context. `temperature` and `top_p` None: what the checkpoint recommends in
    generation_config.json, else 1.0; temperature 0.0 is greedy. `seed` None: a new one for every request.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, **given: Any) -> SamplingOptions:
        """Build from keyword arguments; `stop` may be one string. BadRequestError for unknown names and ranges."""
        known = {field.name for field in fields(cls)}
        for name in given:
            if name not in known:
                raise BadRequestError(
                    f"unknown sampling option {name!r}", hint=f"known: {', '.join(sorted(known))}", param=name
                )
        stop = given.pop("stop", None) or ()
        options = cls(**given, stop=(stop,) if isinstance(stop, str) else tuple(stop))
        options.check()
        return options

    def check(self) -> None:
        """Raise BadRequestError, naming the field, where a value is out of its range."""
        if self.max_tokens is not None and self.max_tokens < 1:
            raise BadRequestError(f"max_tokens must be at least 1, not {self.max_tokens}", param="max_tokens")
        if self.temperature is not None and not 0.0 <= self.temperature <= 2.0:
            raise BadRequestError(f"temperature must be between 0 and 2, not {self.temperature}", param="temperature")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise BadRequestError(f"top_p must be above 0 and at most 1, not {self.top_p}", param="top_p")
        if any(not text for text in self.stop):
            raise BadRequestError("a stop string must not be empty", param="stop")


@dataclass(frozen=True)
class Completion:
    """A finished answer. `token_ids` holds every generated id, the stopping one included; `text` ends before it.

    `token_ids` is empty where the answer came from a server that sends text only; `completion_tokens` counts anyway.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


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
    calls, content = message.get("tool_calls"), message.get("content")
    if not isinstance(content, str) and not (content is None and calls):
        raise BadRequestError(f"content must be text, not {content!r}", param=f"messages.{index}.content")
    return Message(**{**message, "tool_calls": None if calls is None else tuple(calls)})
