"""OpenAI's Responses, field for field: what a request may hold. Answers are in `responses_answer`.

Tools that are no functions are left out, as they would run on OpenAI's side; whoever declares them beside functions
(Codex does) is served with the functions. Given up: `truncation: auto` (nothing is ever cut off), stored prompts and
conversations, background work's time windows; all refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field, StringConstraints

from kvern.errors import BadRequestError
from kvern.text.conversation import Conversation
from kvern.text.messages import NamedTool, Tool, ToolChoice
from kvern.text.options import SamplingOptions
from kvern.wire.fields import Effort, Logprobs, Name, SamplingFields, StreamOptions, Strict, Text
from kvern.wire.reading import Inert, drop_inert, parse_object, validate
from kvern.wire.responses_items import Id, Item, Loose, TextOrParts, parse_items, read_part, to_messages
from kvern.wire.structured import TextFormat

NOT_SUPPORTED_YET: Inert = {
    "access_programs": (),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "max_tokens": (),
    "moderation": (),
    "n": (1,),
    "prompt": (),
    "prompt_cache_options": ({}, {"mode": "implicit"}),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "service_tier": ("auto", "default"),
    "truncation": ("disabled",),
}
"""OpenAI's fields that Kvern does not compute, each with the values that ask for nothing."""

HINTS: Mapping[str, str] = {
    "conversation": "previous_response_id continues a stored response",
    "max_tokens": "here it is called max_output_tokens",
    "truncation": "nothing is ever cut off here; shorten the input",
}
LOGPROBS, SEALED_REASONING = "message.output_text.logprobs", "reasoning.encrypted_content"
Includable: TypeAlias = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]
"""What may be asked for. All but the first two belong to items that never occur here, so they add nothing."""

MetadataKey = Annotated[Text, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[Text, StringConstraints(max_length=512)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class ReasoningFields(Strict):
    """`effort` none turns thinking off, any other turns it on, where the model can do both.

    `summary`: the reasoning comes as a summary item, in full; otherwise as reasoning text.
    """

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None


class TextFields(Strict):
    """The form of the answer's text."""

    format: TextFormat = TextFormat()
    verbosity: Literal["medium"] | None = Field(default=None, description="The only length there is.")


class FunctionTool(Loose):
    """A function that the model may ask for."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False

    def to_tool(self) -> Tool:
        """Translate into the tool that templates read."""
        return Tool(self.name, self.description, self.parameters or {}, self.strict)

    def echo(self) -> dict[str, Any]:
        """The tool as an answer repeats it."""
        return {"type": "function", **self.model_dump()}


class ResponsesRequest(SamplingFields):
    """The body of POST /v1/responses."""

    input: TextOrParts = Field(description="A text, or items: messages, function calls and their outputs, reasoning.")
    instructions: Text | None = Field(default=None, description="A system message for this response alone.")
    previous_response_id: Id | None = Field(default=None, description="A stored response that this one continues.")
    store: bool = Field(default=True, description="Keep the response, for --response-ttl seconds.")
    background: bool = Field(default=False, description="Answer at once, and compute for whoever asks later.")
    include: list[Includable] = Field(default=[], max_length=32)
    max_output_tokens: int | None = Field(default=None, ge=1, description="Default: up to the end of the context.")
    max_tool_calls: int | None = Field(default=None, ge=1, description="Bounds OpenAI's own tools; there are none.")
    metadata: dict[MetadataKey, MetadataValue] = Field(default={}, max_length=16)
    parallel_tool_calls: bool = True
    prompt_cache_key: Name | None = Field(default=None, description="A label; equal prefixes are found without it.")
    safety_identifier: Name | None = Field(default=None, description="A label; it changes nothing in the answer.")
    client_metadata: dict[str, Any] = Field(default={}, description="Codex's label; it changes nothing.")
    reasoning: ReasoningFields = ReasoningFields()
    text: TextFields = TextFields()
    tools: list[dict[str, Any]] = Field(default=[], max_length=1024, description="Those of type function are used.")
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] = "auto"
    top_logprobs: Logprobs = Field(default=0, description=f"Needs {LOGPROBS} in include.")

    @property
    def functions(self) -> list[FunctionTool]:
        """The tools that are functions."""
        return _functions(self.tools)

    @property
    def logprobs(self) -> bool:
        """Whether the text comes with log-probabilities."""
        return LOGPROBS in self.include

    def to_conversation(self, items: Sequence[Item], can_think: bool = True) -> Conversation:
        """What is to be answered, as the request path reads it; `items` are all that come before the answer.

        Clients send an effort to any model, so one that can not think just answers. Raises BadRequestError for items
        that are no conversation.
        """
        messages = to_messages(items, self.instructions)
        if not messages:
            raise BadRequestError("the input holds nothing to answer", param="input")
        choice, allowed = _choice(self.tool_choice, self.functions)
        tools = tuple(tool.to_tool() for tool in self.functions if allowed is None or tool.name in allowed)
        thinking = None if self.reasoning.effort is None else self.reasoning.effort != "none"
        thinking = None if thinking and not can_think else thinking
        form = self.text.format.to_format()
        return Conversation(tuple(messages), tools, choice, self.parallel_tool_calls, thinking, format=form)

    def to_options(self) -> SamplingOptions:
        """The sampling options, as the request path reads them."""
        return self.options(self.max_output_tokens, logprobs=self.top_logprobs if self.logprobs else None)


def parse_responses_request(body: bytes) -> tuple[ResponsesRequest, list[Item]]:
    """Read a request body: the request, and its input as checked items (without ids where none were given).

    Raises BadRequestError with `param` for everything that is not exactly such a request.
    """
    fields = _drop(parse_object(body))
    for name in ("reasoning", "text"):
        if isinstance(fields.get(name), dict):
            fields[name] = drop_inert(fields[name], {}, f"{name}.")
    parts: dict[str, type[BaseModel]] = {
        "reasoning": ReasoningFields,
        "text": TextFields,
        "stream_options": StreamOptions,
    }
    request = validate(ResponsesRequest, fields, parts)
    if request.include_usage:
        hint = "response.completed has it always"
        raise BadRequestError("include_usage belongs to chat", hint=hint, param="stream_options.include_usage")
    if request.background and not request.store:
        raise BadRequestError("background needs store: true: nobody could fetch the answer", param="background")
    if request.top_logprobs and not request.logprobs:
        raise BadRequestError(f"top_logprobs needs {LOGPROBS} in include", param="top_logprobs")
    for name in ("tools", "tool_choice"):
        _check_unicode(getattr(request, name), name)
    _choice(request.tool_choice, request.functions)
    request.text.format.to_format()
    return request, parse_items(request.input)


def _drop(fields: dict[str, Any]) -> dict[str, Any]:
    try:
        return drop_inert(fields, NOT_SUPPORTED_YET)
    except BadRequestError as error:
        raise BadRequestError(error.message, hint=HINTS.get(error.param or ""), param=error.param) from error


def _check_unicode(value: Any, where: str) -> None:
    """Schemas come back in the answer, which can not hold half a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        what = "holds half of a surrogate pair, which is no character"
        raise BadRequestError(f"{where} {what}", param=where) from error


def _functions(tools: Sequence[Mapping[str, Any]]) -> list[FunctionTool]:
    read: dict[str, FunctionTool] = {}
    for index, tool in enumerate(tools):
        where = f"tools.{index}"
        if not isinstance(tool.get("type"), str):
            raise BadRequestError(f"{where}.type is missing", hint="functions are used", param=f"{where}.type")
        if tool["type"] != "function":
            continue
        function = read_part(FunctionTool, tool, where)
        if function.name in read:
            raise BadRequestError(f"two tools are called {function.name}", param=f"{where}.name")
        read[function.name] = function
    return list(read.values())


class _Named(Loose):
    name: FunctionName


class _Allowed(Loose):
    mode: Literal["auto", "required"]
    tools: list[dict[str, Any]]


def _choice(given: str | Mapping[str, Any], tools: Sequence[FunctionTool]) -> tuple[ToolChoice, set[str] | None]:
    """The choice, and the names it allows where it names any. Raises BadRequestError for what no tool can meet."""
    known = {tool.name for tool in tools}
    if isinstance(given, Mapping):
        return _choice_of(given, known)
    if given == "required" and not known:
        raise BadRequestError("tool_choice required needs a tool of type function", param="tool_choice")
    return ("auto" if given == "auto" else "none" if given == "none" else "required"), None


def _choice_of(given: Mapping[str, Any], known: set[str]) -> tuple[ToolChoice, set[str] | None]:
    kind = given.get("type")
    if kind == "function":
        name = read_part(_Named, given, "tool_choice").name
        if name not in known:
            raise BadRequestError(f"tool_choice names {name}, which is not in tools", param="tool_choice.name")
        return NamedTool(name), None
    if kind != "allowed_tools":
        raise BadRequestError(
            f"tool_choice of type {str(kind)[:64]!r} is not supported",
            hint='"none", "auto", "required", a function or allowed_tools',
            param="tool_choice",
        )
    allowed = read_part(_Allowed, given, "tool_choice")
    names = {str(tool.get("name")) for tool in allowed.tools if tool.get("type") == "function"}
    if unknown := sorted(names - known):
        raise BadRequestError(
            f"tool_choice allows {unknown[0][:128]!r}, which is not in tools", param="tool_choice.tools"
        )
    if allowed.mode == "required" and not names:
        raise BadRequestError("tool_choice required needs a tool of type function", param="tool_choice.tools")
    return allowed.mode, names
