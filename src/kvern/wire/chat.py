"""OpenAI's Chat Completions, field for field: what a request may hold, and what an answer looks like."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    Tag,
    model_serializer,
)

from kvern.errors import BadRequestError
from kvern.text.conversation import Conversation
from kvern.text.messages import (
    Completion,
    FinishReason,
    Message,
    NamedTool,
    Role,
    ScoredToken,
    TokenScore,
    Tool,
    ToolCall,
)
from kvern.text.options import SamplingOptions
from kvern.text.output_format import OutputFormat
from kvern.wire.answers import Usage
from kvern.wire.fields import (
    LIST,
    OBJECT,
    STRING,
    Effort,
    JSONObject,
    Logprobs,
    Name,
    SamplingFields,
    StreamOptions,
    Strict,
    Text,
    string_or_list,
    string_or_object,
)
from kvern.wire.reading import Inert, drop_inert, parse_object, validate
from kvern.wire.structured import GuidedFields, ResponseFormat, StructuredOutputs, only

LEAST_LOGPROB = -9999.0
"""OpenAI's number for what is all but impossible; JSON has no infinity."""

NOT_SUPPORTED_YET: Inert = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": ({}, {"mode": "implicit"}),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""OpenAI's fields that Kvern does not compute, each with the values that ask for nothing."""

MESSAGE_NOT_SUPPORTED_YET: Inert = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}
MAX_TOOLS = 1024


class TextPart(Strict):
    """One text part of a message; parts are joined without anything between them."""

    type: Literal["text"]
    text: Text


TextOrParts = Annotated[
    Annotated[Text, Tag(STRING)] | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag(LIST)],
    Discriminator(string_or_list),
]


class RequestFunctionCall(Strict):
    """What is called. `arguments` is JSON text as the model wrote it, so it may be broken."""

    name: Name
    arguments: Text


class RequestToolCall(Strict):
    """A call that an assistant's turn holds. `index` is what streams carry, for clients that send it back."""

    id: Name
    type: Literal["function"] = "function"
    function: RequestFunctionCall
    index: int | None = None


class RequestMessage(Strict):
    """One turn. The role `developer` is OpenAI's newer word for `system`.

    An assistant's turn may consist of tool_calls alone; one of the role `tool` answers the call tool_call_id.
    `reasoning` is another name of reasoning_content. `prefix` (DeepSeek's) makes the last turn, an
    assistant's, the beginning of the answer.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: TextOrParts | None = None
    name: Name | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    tool_calls: list[RequestToolCall] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_call_id: Name | None = None
    prefix: bool = False

    def to_message(self) -> Message:
        """Translate into the message that templates read."""
        role: Role = "system" if self.role == "developer" else self.role
        calls = tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or ())
        reasoning = self.reasoning if self.reasoning_content is None else self.reasoning_content
        return Message(role, self._text(), self.name, calls, self.tool_call_id, reasoning)

    def _text(self) -> str | None:
        if self.content is None or isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class FunctionDefinition(Strict):
    """A function that the model may call. `parameters` is a JSON schema; without it, the function takes none."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: Text | None = None
    parameters: JSONObject | None = None
    strict: bool | None = Field(default=None, description="true: arguments match the schema.")


class ToolDefinition(Strict):
    """One of the tools."""

    type: Literal["function"]
    function: FunctionDefinition

    def to_tool(self) -> Tool:
        """Translate into what templates read."""
        asked = self.function
        return Tool(asked.name, asked.description, asked.parameters or {}, bool(asked.strict))


class FunctionName(Strict):
    """Which function."""

    name: Name


class NamedToolChoice(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoiceField = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(STRING)] | Annotated[NamedToolChoice, Tag(OBJECT)],
    Discriminator(string_or_object),
]


class ThinkingSwitch(Strict):
    """DeepSeek's switch: whether the model thinks before it answers, where it can do both."""

    type: Literal["enabled", "disabled"]


class ChatCompletionRequest(SamplingFields, GuidedFields):
    """The body of POST /v1/chat/completions."""

    messages: list[RequestMessage] = Field(min_length=1, fail_fast=True)
    tools: list[ToolDefinition] = Field(default=[], max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: ToolChoiceField | None = Field(default=None, description="Default: auto.")
    parallel_tool_calls: bool = Field(default=True, description="false: the answer ends after one call.")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="Default: up to the end of the context.")
    max_tokens: int | None = Field(default=None, ge=1, description="The older name of max_completion_tokens.")
    thinking: ThinkingSwitch | None = Field(default=None, description="Default: what the model does by itself.")
    response_format: ResponseFormat | None = Field(default=None, description="What the content must match.")
    reasoning_effort: Effort | None = Field(default=None, description="none: no thinking; any other: thinking.")
    logprobs: bool = False
    top_logprobs: Logprobs | None = Field(default=None, description="Needs logprobs: true.")
    prompt_cache_key: Name | None = Field(default=None, description="A label; equal prefixes are found without it.")
    safety_identifier: Name | None = Field(default=None, description="A label; it changes nothing in the answer.")

    def to_conversation(self, can_think: bool = True) -> Conversation:
        """What is to be answered, as the request path reads it; `can_think`: whether the model can."""
        choice = self.tool_choice or "auto"
        return Conversation(
            tuple(message.to_message() for message in self.messages),
            tuple(tool.to_tool() for tool in self.tools),
            choice if isinstance(choice, str) else NamedTool(choice.function.name),
            self.parallel_tool_calls,
            thinking=self._thinks(can_think),
            continues=self.messages[-1].prefix,
            format=self.output_format(),
        )

    def output_format(self) -> OutputFormat | None:
        """What the content must match. Raises BadRequestError for contradictions."""
        asked = None if self.response_format is None else self.response_format.to_format()
        return only([one for one in (asked, self.guided_format()) if one is not None])

    def _thinks(self, can_think: bool) -> bool | None:
        """The switch, or the effort. Clients send an effort to any model, so one that can not think just answers."""
        if self.thinking is not None or self.reasoning_effort is None:
            return None if self.thinking is None else self.thinking.type == "enabled"
        asked = self.reasoning_effort != "none"
        return None if asked and not can_think else asked

    def to_options(self) -> SamplingOptions:
        """The sampling options, as the request path reads them."""
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self.options(limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class TopLogprob(BaseModel):
    """A token that could have been drawn."""

    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    """A token that was drawn, and the most likely ones at its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Log-probabilities of the tokens that show in the content."""

    content: list[TokenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, scores: tuple[ScoredToken, ...]) -> ChoiceLogprobs:
        """Build from scored tokens; the one that ended the answer is no content."""
        return cls(
            content=[
                TokenLogprob(**_score(one), top_logprobs=[TopLogprob(**_score(best)) for best in one.top])
                for one in scores
                if not one.ends
            ]
        )


class AnswerFunction(BaseModel):
    """What is to be called, with JSON text."""

    name: str
    arguments: str


class AnswerToolCall(BaseModel):
    """A call that the model asks for."""

    index: int
    id: str
    type: Literal["function"] = "function"
    function: AnswerFunction


class AnswerMessage(BaseModel):
    """The assistant's turn. What it has not is left out; `reasoning` repeats reasoning_content for vLLM's clients."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[AnswerToolCall] | None = None

    @classmethod
    def of(cls, answer: Completion) -> AnswerMessage:
        """Build from a finished answer; content is null where there are calls and no text."""
        calls = [
            AnswerToolCall(index=index, id=call.id, function=AnswerFunction(name=call.name, arguments=call.arguments))
            for index, call in enumerate(answer.tool_calls)
        ]
        thought = answer.reasoning or None
        content = answer.content or (None if calls else "")
        return cls(content=content, reasoning_content=thought, reasoning=thought, tool_calls=calls or None)

    @model_serializer(mode="wrap")
    def _leave_out(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        optional = ("reasoning_content", "reasoning", "tool_calls")
        return {name: value for name, value in serialize(self).items() if value is not None or name not in optional}


class Choice(BaseModel):
    """One of the `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The answer to a request that does not stream."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str


def parse_chat_request(body: bytes) -> ChatCompletionRequest:
    """Read a request body. Raises BadRequestError with `param` for everything that is not exactly such a request."""
    return read_chat_request(parse_object(body))


def read_chat_request(given: dict[str, Any]) -> ChatCompletionRequest:
    """Read the fields of a body, likewise."""
    fields = drop_inert(given, NOT_SUPPORTED_YET)
    messages = fields.get("messages")
    if isinstance(messages, list):
        fields["messages"] = [_parse_message(index, message) for index, message in enumerate(messages)]
    tools = fields.get("tools")
    if isinstance(tools, list):
        fields["tools"] = [_parse_tool(index, tool) for index, tool in enumerate(tools)]
    parts: dict[str, type[BaseModel]] = {
        "messages": RequestMessage,
        "stream_options": StreamOptions,
        "tools": ToolDefinition,
        "thinking": ThinkingSwitch,
        "response_format": ResponseFormat,
        "structured_outputs": StructuredOutputs,
    }
    request = validate(ChatCompletionRequest, fields, parts)
    for index, message in enumerate(request.messages):
        _check_message(f"messages.{index}", message)
        if message.prefix and (index < len(request.messages) - 1 or message.role != "assistant" or message.tool_calls):
            says = "prefix belongs to the text of an assistant's last message"
            raise BadRequestError(says, param=f"messages.{index}.prefix")
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise BadRequestError("max_tokens and max_completion_tokens contradict each other", param="max_tokens")
    if request.top_logprobs and not request.logprobs:
        raise BadRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    request.output_format()
    return request


def _parse_message(index: int, message: Any) -> Any:
    where = f"messages.{index}"
    if not isinstance(message, dict):
        return message
    if message.get("role") == "function":
        hint = "use tool_calls and the role tool"
        raise BadRequestError("messages of role 'function' are not supported", hint=hint, param=f"{where}.role")
    return drop_inert(message, MESSAGE_NOT_SUPPORTED_YET, f"{where}.")


def _parse_tool(index: int, tool: Any) -> Any:
    if isinstance(tool, dict) and isinstance(tool.get("type"), str) and tool["type"] != "function":
        says = f"tools of type {tool['type']!r} are not supported"
        raise BadRequestError(says, hint="only functions are", param=f"tools.{index}.type")
    return tool


def _check_message(where: str, message: RequestMessage) -> None:
    """What depends on the role."""
    if message.tool_calls and message.role != "assistant":
        raise BadRequestError("only an assistant's message has tool_calls", param=f"{where}.tool_calls")
    if (message.tool_call_id is not None) != (message.role == "tool"):
        says = "is missing" if message.role == "tool" else "belongs to messages of role 'tool'"
        raise BadRequestError(f"tool_call_id {says}", param=f"{where}.tool_call_id")
    if message.content is None and not message.tool_calls:
        raise BadRequestError(f"{where}.content is missing", param=f"{where}.content")


def _score(score: TokenScore) -> dict[str, Any]:
    logprob = LEAST_LOGPROB if score.logprob is None else max(score.logprob, LEAST_LOGPROB)
    return {"token": score.text, "bytes": list(score.raw), "logprob": logprob}
