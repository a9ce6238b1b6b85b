"""Anthropic's Messages, field for field: what a request may hold, and the conversation that it becomes.

Read as strictly as the other dialects: a field that Kvern does not compute is refused by name. Wishes are accepted and
change nothing: `cache_control` (prefixes are cached anyway), `metadata`, `output_config.effort`, the size of a thinking
budget, and `context_management` (answers say that no edit was applied). The system block with which Claude Code signs
each request is dropped, because it differs every time and would spoil the prefix cache.

Within a turn, blocks of text are joined by an empty line; thinking that was encrypted elsewhere is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from kvern.errors import BadRequestError
from kvern.text.conversation import Conversation
from kvern.text.messages import Message, NamedTool, Role, Tool, ToolCall, ToolChoice
from kvern.text.options import MAX_STOPS, SamplingOptions
from kvern.wire.fields import LIST, STRING, JSONObject, Name, StopString, Strict, Text, string_or_list
from kvern.wire.reading import Inert, drop_inert, parse_object, read
from kvern.wire.structured import JSONOutputFormat

BILLING_HEADER = "x-anthropic-billing-header"
NOT_SUPPORTED_YET: Inert = {
    "billing_policy": (),
    "compaction": (),
    "container": (),
    "diagnostics": (),
    "fallback_credit_token": (),
    "fallbacks": ([],),
    "inference_geo": (),
    "mcp_servers": ([],),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "thread": (),
}
"""Anthropic's fields that Kvern does not compute, each with the values that ask for nothing."""

TOOL_NOT_SUPPORTED_YET: Inert = {"allowed_callers": ([], ["direct"]), "input_examples": ([],)}
BLOCK_NOT_SUPPORTED_YET: Inert = {
    "caller": ({"type": "direct"},),
    "citations": ([], {"enabled": False}),
    "toolset_name": (),
}
BLOCKS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")
TURNS = {
    "text": ("user", "assistant", "system"),
    "thinking": ("assistant",),
    "redacted_thinking": ("assistant",),
    "tool_use": ("assistant",),
    "tool_result": ("user",),
}
"""Whose turns may hold which block."""

CacheControl = JSONObject | None


class TextBlock(Strict):
    """Text."""

    type: Literal["text"]
    text: Text
    cache_control: CacheControl = None


class ThinkingBlock(Strict):
    """What the model thought, as an answer gave it; the signature is not looked at."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text = ""
    cache_control: CacheControl = None


class RedactedThinkingBlock(Strict):
    """Thinking that only Anthropic can read."""

    type: Literal["redacted_thinking"]
    data: Text
    cache_control: CacheControl = None


class ToolUseBlock(Strict):
    """A call that the assistant asked for."""

    type: Literal["tool_use"]
    id: Name
    name: Name
    input: JSONObject
    cache_control: CacheControl = None


def text_of(content: str | list[TextBlock]) -> str:
    """A text, or its blocks joined by empty lines."""
    return content if isinstance(content, str) else "\n\n".join(block.text for block in content)


TextOrBlocks = Annotated[
    Annotated[Text, Tag(STRING)] | Annotated[list[TextBlock], Field(fail_fast=True), Tag(LIST)],
    Discriminator(string_or_list),
]


class ToolResultBlock(Strict):
    """What a call returned. `is_error` shows to the model as the word "Error" before the text."""

    type: Literal["tool_result"]
    tool_use_id: Name
    content: TextOrBlocks = ""
    is_error: bool = False
    cache_control: CacheControl = None

    def to_message(self) -> Message:
        """Translate into the message that templates read."""
        text = text_of(self.content)
        return Message("tool", f"Error: {text}" if self.is_error else text, tool_call_id=self.tool_use_id)


def _block(value: Any) -> str:
    """The tag of a block; what is none is read as text, and refused there."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"({kind})" if kind in BLOCKS else "(text)"


Block = Annotated[
    Annotated[TextBlock, Tag("(text)")]
    | Annotated[ThinkingBlock, Tag("(thinking)")]
    | Annotated[RedactedThinkingBlock, Tag("(redacted_thinking)")]
    | Annotated[ToolUseBlock, Tag("(tool_use)")]
    | Annotated[ToolResultBlock, Tag("(tool_result)")],
    Discriminator(_block),
]


class Turn(Strict):
    """One turn. Results of tools are in the user's turns; the last turn may be the beginning of the answer."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[Text, Tag(STRING)] | Annotated[list[Block], Field(fail_fast=True), Tag(LIST)],
        Discriminator(string_or_list),
    ]

    def to_messages(self) -> Iterator[Message]:
        """Translate into the messages that templates read: one for each result, one for the rest."""
        text = self.content
        blocks: Sequence[Block] = [TextBlock(type="text", text=text)] if isinstance(text, str) else text
        results = [block.to_message() for block in blocks if isinstance(block, ToolResultBlock)]
        yield from results
        texts = [block for block in blocks if isinstance(block, TextBlock)]
        if self.role == "assistant":
            yield self._answer(blocks, text_of(texts))
        elif texts or not results:
            role: Role = self.role
            yield Message(role, text_of(texts))

    def _answer(self, blocks: Sequence[Block], text: str) -> Message:
        calls = tuple(
            ToolCall(block.id, block.name, json.dumps(block.input, ensure_ascii=False))
            for block in blocks
            if isinstance(block, ToolUseBlock)
        )
        thoughts = "\n\n".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
        content = None if calls and not text else text
        return Message("assistant", content, tool_calls=calls, reasoning_content=thoughts or None)


class AnthropicTool(Strict):
    """A function that the client runs."""

    type: Literal["custom"] = "custom"
    name: Name
    description: Text | None = None
    input_schema: JSONObject
    strict: bool = False
    cache_control: CacheControl = None
    defer_loading: bool = Field(default=False, description="Tools are always loaded.")
    eager_input_streaming: bool = Field(default=True, description="Arguments always stream as they come.")


class AnthropicToolChoice(Strict):
    """Whether to call a tool, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False


class AnthropicThinking(Strict):
    """Whether to think first. `display: omitted` leaves the text of it out of the answer."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(Strict):
    """Wishes about the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JSONOutputFormat | None = Field(default=None, description="What the text of the answer must match.")


class AnthropicMetadata(Strict):
    """Who asks, in the caller's own words."""

    user_id: Text | None = None


class CountTokensRequest(Strict):
    """What is to be answered: the body of POST /v1/messages/count_tokens."""

    model: Name
    messages: list[Turn] = Field(min_length=1, fail_fast=True)
    system: TextOrBlocks = ""
    tools: list[AnthropicTool] = Field(default=[], fail_fast=True)
    tool_choice: AnthropicToolChoice | None = None
    thinking: AnthropicThinking | None = None
    cache_control: CacheControl = None
    context_management: JSONObject | None = None
    output_config: OutputConfig | None = None

    def to_conversation(self) -> Conversation:
        """What is to be answered, as the request path reads it."""
        turns = tuple(message for turn in self.messages for message in turn.to_messages())
        choice = self.tool_choice
        return Conversation(
            (*self._system(), *turns),
            tools=tuple(Tool(one.name, one.description, one.input_schema, one.strict) for one in self.tools),
            tool_choice=_choice(choice),
            parallel_tool_calls=choice is None or not choice.disable_parallel_tool_use,
            thinking=None if self.thinking is None else THINKS.get(self.thinking.type),
            continues=self.messages[-1].role == "assistant",
            format=self.output_config.format.to_format() if self.output_config and self.output_config.format else None,
        )

    def _system(self) -> tuple[Message, ...]:
        blocks = self.system
        if not isinstance(blocks, str):
            blocks = [block for block in blocks if not block.text.startswith(BILLING_HEADER)]
        text = text_of(blocks)
        return (Message("system", text),) if text else ()


THINKS = {"enabled": True, "disabled": False}


class MessagesRequest(CountTokensRequest):
    """The body of POST /v1/messages."""

    max_tokens: int = Field(ge=1, lt=2**31, description="More than the context has room for ends where it is full.")
    stop_sequences: list[StopString] = Field(default=[], max_length=MAX_STOPS)
    stream: bool = False
    temperature: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    metadata: AnthropicMetadata | None = None

    def to_options(self) -> SamplingOptions:
        """The sampling options, as the request path reads them; `max_tokens` is left to the room that there is."""
        return SamplingOptions(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, stop=tuple(self.stop_sequences)
        )


PARTS: Mapping[str, type[BaseModel]] = {
    "thinking": AnthropicThinking,
    "tool_choice": AnthropicToolChoice,
    "output_config": OutputConfig,
    "metadata": AnthropicMetadata,
}


def parse_messages_request(body: bytes) -> MessagesRequest:
    """Read a request body. Raises BadRequestError with `param` for everything that is not exactly such a request."""
    request = read(MessagesRequest, _readable(body), PARTS)
    _check(request)
    return request


def parse_count_request(body: bytes) -> CountTokensRequest:
    """Read a request for a count of tokens. Raises BadRequestError with `param`."""
    request = read(CountTokensRequest, _readable(body), PARTS)
    _check(request)
    return request


def _choice(choice: AnthropicToolChoice | None) -> ToolChoice:
    if choice is None or choice.type == "auto":
        return "auto"
    if choice.type == "none":
        return "none"
    return "required" if choice.name is None else NamedTool(choice.name)


def _readable(body: bytes) -> dict[str, Any]:
    """The fields, without what asks for nothing. Refuses by name what Kvern cannot do."""
    fields = drop_inert(parse_object(body), NOT_SUPPORTED_YET)
    for name, change in (("messages", _turn), ("tools", _tool), ("system", _part)):
        if isinstance(fields.get(name), list):
            fields[name] = [change(f"{name}.{index}", value) for index, value in enumerate(fields[name])]
    return fields


def _tool(where: str, tool: Any) -> Any:
    if not isinstance(tool, dict):
        return tool
    kind = tool.get("type")
    if isinstance(kind, str) and kind != "custom":
        raise BadRequestError(
            f"tools of type {kind!r} are not supported", hint="only tools with an input_schema", param=f"{where}.type"
        )
    return drop_inert(tool, TOOL_NOT_SUPPORTED_YET, f"{where}.")


def _turn(where: str, turn: Any) -> Any:
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
        return turn
    blocks = [_part(f"{where}.content.{index}", block) for index, block in enumerate(turn["content"])]
    for index, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, dict) else None
        if isinstance(kind, str) and turn.get("role") not in TURNS[kind]:
            param = f"{where}.content.{index}.type"
            raise BadRequestError(f"a turn of {turn.get('role')!r} may not hold {kind} blocks", param=param)
    return {**turn, "content": blocks}


def _part(where: str, block: Any) -> Any:
    """A block without what asks for nothing, and the blocks inside it likewise."""
    if not isinstance(block, dict):
        return block
    kind = block.get("type")
    if isinstance(kind, str) and kind not in BLOCKS:
        raise BadRequestError(f"{kind} blocks are not supported: the model here reads text", param=f"{where}.type")
    kept = drop_inert(block, BLOCK_NOT_SUPPORTED_YET, f"{where}.")
    if kind == "tool_result" and isinstance(kept.get("content"), list):
        kept["content"] = [_part(f"{where}.content.{index}", part) for index, part in enumerate(kept["content"])]
    return kept


def _check(request: CountTokensRequest) -> None:
    """What no single field shows."""
    choice = request.tool_choice
    if choice is not None:
        if (choice.name is not None) != (choice.type == "tool"):
            raise BadRequestError("name goes with type tool, and only with it", param="tool_choice.name")
        if choice.type in ("any", "tool") and not request.tools:
            raise BadRequestError(f"tool_choice {choice.type} needs tools", param="tool_choice")
        if choice.name is not None and choice.name not in {tool.name for tool in request.tools}:
            raise BadRequestError(f"there is no tool {choice.name!r} in tools", param="tool_choice.name")
    last = request.messages[-1]
    if last.role == "assistant" and any(isinstance(block, ToolUseBlock) for block in last.content):
        param = f"messages.{len(request.messages) - 1}.content"
        raise BadRequestError("a call needs its result before the model goes on", param=param)
    _check_results(request)


def _check_results(request: CountTokensRequest) -> None:
    """Each result answers a call of the turn before it."""
    asked: set[str] = set()
    for index, turn in enumerate(request.messages):
        blocks = [] if isinstance(turn.content, str) else turn.content
        for place, block in enumerate(blocks):
            if isinstance(block, ToolResultBlock) and block.tool_use_id not in asked:
                param = f"messages.{index}.content.{place}.tool_use_id"
                message = f"there is no tool_use block {block.tool_use_id!r} in the turn before"
                raise BadRequestError(message, param=param)
        if turn.role == "assistant":
            asked = {block.id for block in blocks if isinstance(block, ToolUseBlock)}
