"""OpenAI's Chat Completions, field for field: what a request may hold, and what an answer looks like.

A request is read strictly: no coercion ("1" is no number), null is absent, and a field that Kvern does not compute is
refused by name, never dropped. A field of OpenAI's that would change nothing at the given value (`n: 1`, `tools: []`)
is accepted. Every refusal is a BadRequestError whose `param` is the path of the field (`messages.0.content`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
)

from kvern.errors import BadRequestError, KvernError
from kvern.text.messages import FinishReason, Message, Role, SamplingOptions

MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
NOT_SUPPORTED_YET: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
"""OpenAI's fields that Kvern does not compute, each with the values that ask for nothing."""
MESSAGE_NOT_SUPPORTED_YET: Mapping[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}


def _check_unicode(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half of a surrogate pair, which is no character")
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
StopString = Annotated[Text, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]
RECOMMENDED = "Default: what the checkpoint recommends, else 1."


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Strict):
    """One text part of a message; parts are joined without anything between them."""

    type: Literal["text"]
    text: Text


def _string_or_list(value: Any) -> str:
    return "list" if isinstance(value, list) else "string"


TextOrParts = Annotated[
    Annotated[Text, Tag("string")] | Annotated[list[TextPart], Field(min_length=1), Tag("list")],
    Discriminator(_string_or_list),
]
StopOrStops = Annotated[
    Annotated[StopString, Tag("string")] | Annotated[list[StopString], Field(max_length=MAX_STOPS), Tag("list")],
    Discriminator(_string_or_list),
]


class RequestMessage(_Strict):
    """One turn. The role `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: TextOrParts
    name: Name | None = None
    reasoning_content: Text | None = None

    def to_message(self) -> Message:
        """Translate into the message that templates read."""
        role: Role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role, text, name=self.name, reasoning_content=self.reasoning_content)


class StreamOptions(_Strict):
    """`include_usage`: one more chunk, without choices, that carries the usage."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ChatCompletionRequest(_Strict):
    """The body of POST /v1/chat/completions."""

    model: Name
    messages: list[RequestMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, description="Default: up to the end of the context.")
    max_tokens: int | None = Field(default=None, ge=1, description="The older name of max_completion_tokens.")
    temperature: float | None = Field(
        default=None,
        ge=0.0,
        le=2.0,
        allow_inf_nan=False,
        description="Default: what the checkpoint recommends, else 1.",
    )
    top_p: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        allow_inf_nan=False,
        description="Default: what the checkpoint recommends, else 1.",
    )
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopOrStops | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Name | None = Field(default=None, description="The caller's own label; it changes nothing in the answer.")

    def to_messages(self) -> list[Message]:
        """The conversation, as templates read it."""
        return [message.to_message() for message in self.messages]

    def to_options(self) -> SamplingOptions:
        """The sampling options, as the request path reads them."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return SamplingOptions(limit, self.temperature, self.top_p, self.seed, stop)


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0


class Usage(BaseModel):
    """Tokens of a request, in OpenAI's names."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> Usage:
        """Build from the two counts."""
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(),
        )


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int = 0
    message: AnswerMessage
    logprobs: None = None
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


class Model(BaseModel):
    """A served model. `max_model_len`: the longest prompt and answer together, in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["kvern"] = "kvern"
    max_model_len: int


class ModelList(BaseModel):
    """The answer to GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The one envelope of every error, whatever the status."""

    error: ErrorDetail


ERROR_TYPES: Mapping[int, str] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(error: KvernError) -> ErrorBody:
    """Put an error into the envelope; the hint goes into the message, because clients show nothing else."""
    kind = "server_error" if error.status >= 500 else ERROR_TYPES.get(error.status, "invalid_request_error")
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    return ErrorBody(error=ErrorDetail(message=message, type=kind, param=error.param, code=error.code))


def parse_chat_request(body: bytes) -> ChatCompletionRequest:
    """Read a request body. Raises BadRequestError with `param` for everything that is not exactly such a request."""
    fields = _drop_inert(_parse_object(body), NOT_SUPPORTED_YET, "")
    messages = fields.get("messages")
    if isinstance(messages, list):
        fields["messages"] = [_parse_message(index, message) for index, message in enumerate(messages)]
    try:
        request = ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        _refuse(error)
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise BadRequestError("max_tokens and max_completion_tokens contradict each other", param="max_tokens")
    if request.stream_options is not None and not request.stream:
        raise BadRequestError("stream_options needs stream: true", param="stream_options")
    return request


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise BadRequestError("the body is nested too deeply") from error
    except ValueError as error:  # malformed JSON, malformed UTF-8, integers beyond any use
        raise BadRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRequestError("the body must be a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _parse_message(index: int, message: Any) -> Any:
    where = f"messages.{index}"
    if not isinstance(message, dict):
        return message
    if message.get("role") in ("tool", "function"):
        raise BadRequestError(f"messages of role {message['role']!r} are not supported yet", param=f"{where}.role")
    return _drop_inert(message, MESSAGE_NOT_SUPPORTED_YET, f"{where}.")


def _drop_inert(fields: dict[str, Any], table: Mapping[str, tuple[Any, ...]], prefix: str) -> dict[str, Any]:
    """Drop nulls, and fields that ask for nothing; refuse those of the table that ask for something."""
    kept = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name not in table:
            kept[name] = value
        elif not any(_same(value, inert) for inert in table[name]):
            raise BadRequestError(f"{name} is not supported yet", param=f"{prefix}{name}")
    return kept


def _same(value: Any, inert: Any) -> bool:
    """Equality as JSON has it: 0 and 0.0 are one number, but false is not 0."""
    return isinstance(value, bool) == isinstance(inert, bool) and bool(value == inert)


def _refuse(error: ValidationError) -> NoReturn:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(part) for part in first["loc"] if part not in ("string", "list")]
    param = ".".join(path)
    if first["type"] == "extra_forbidden":
        raise BadRequestError(f"unknown field {param!r}", hint=_did_you_mean(path), param=param) from error
    if first["type"] == "missing":
        raise BadRequestError(f"{param} is missing", param=param) from error
    message = first["msg"]
    raise BadRequestError(f"{param}: {message[0].lower()}{message[1:]}", param=param) from error


def _did_you_mean(path: list[str]) -> str | None:
    model: type[BaseModel] = RequestMessage if path[0] == "messages" else ChatCompletionRequest
    near = _nearest(path[-1], model.model_fields)
    return None if near is None else f"did you mean {near!r}?"


def _nearest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)
