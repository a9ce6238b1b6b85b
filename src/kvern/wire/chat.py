"""OpenAI's Chat Completions, field for field: what a request may hold, and what an answer looks like."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from kvern.errors import BadRequestError
from kvern.text.conversation import Conversation
from kvern.text.messages import FinishReason, Message, Role, ScoredToken, TokenScore
from kvern.text.options import SamplingOptions
from kvern.wire.answers import Usage
from kvern.wire.fields import LIST, STRING, Logprobs, Name, SamplingFields, StreamOptions, Strict, Text, string_or_list
from kvern.wire.reading import Inert, drop_inert, parse_object, validate

LEAST_LOGPROB = -9999.0
"""OpenAI's number for what is all but impossible; JSON has no infinity."""

NOT_SUPPORTED_YET: Inert = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""OpenAI's fields that Kvern does not compute, each with the values that ask for nothing."""

MESSAGE_NOT_SUPPORTED_YET: Inert = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}


class TextPart(Strict):
    """One text part of a message; parts are joined without anything between them."""

    type: Literal["text"]
    text: Text


TextOrParts = Annotated[
    Annotated[Text, Tag(STRING)] | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag(LIST)],
    Discriminator(string_or_list),
]


class RequestMessage(Strict):
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


class ChatCompletionRequest(SamplingFields):
    """The body of POST /v1/chat/completions."""

    messages: list[RequestMessage] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(default=None, ge=1, description="Default: up to the end of the context.")
    max_tokens: int | None = Field(default=None, ge=1, description="The older name of max_completion_tokens.")
    logprobs: bool = False
    top_logprobs: Logprobs | None = Field(default=None, description="Needs logprobs: true.")

    def to_conversation(self) -> Conversation:
        """What is to be answered, as the request path reads it."""
        return Conversation(tuple(message.to_message() for message in self.messages))

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


class AnswerMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


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
    fields = drop_inert(parse_object(body), NOT_SUPPORTED_YET)
    messages = fields.get("messages")
    if isinstance(messages, list):
        fields["messages"] = [_parse_message(index, message) for index, message in enumerate(messages)]
    request = validate(ChatCompletionRequest, fields, {"messages": RequestMessage, "stream_options": StreamOptions})
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise BadRequestError("max_tokens and max_completion_tokens contradict each other", param="max_tokens")
    if request.top_logprobs and not request.logprobs:
        raise BadRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    return request


def _parse_message(index: int, message: Any) -> Any:
    where = f"messages.{index}"
    if not isinstance(message, dict):
        return message
    if message.get("role") in ("tool", "function"):
        raise BadRequestError(f"messages of role {message['role']!r} are not supported yet", param=f"{where}.role")
    return drop_inert(message, MESSAGE_NOT_SUPPORTED_YET, f"{where}.")


def _score(score: TokenScore) -> dict[str, Any]:
    logprob = LEAST_LOGPROB if score.logprob is None else max(score.logprob, LEAST_LOGPROB)
    return {"token": score.text, "bytes": list(score.raw), "logprob": logprob}
