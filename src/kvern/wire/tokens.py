"""Tokens of a text or a conversation, and back, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from kvern.errors import BadRequestError
from kvern.text.conversation import Conversation
from kvern.wire.chat import ChatCompletionRequest, read_chat_request
from kvern.wire.fields import Name, Strict, Text, TokenId
from kvern.wire.reading import drop_inert, parse_object, read

INERT: dict[str, tuple[Any, ...]] = {
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "mm_processor_kwargs": ({},),
}
"""vLLM's fields that Kvern does not compute; `prefix: true` on the last message continues it."""


class TokenizeRequest(Strict):
    """The body of POST /tokenize: `prompt`, or `messages` as in Chat Completions (with `tools`)."""

    model: Name | None = Field(default=None, description="Default: the served model.")
    prompt: Text | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, description="Instead of prompt.")
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="The token that begins a text, where the model has one. Default: only for prompt."
    )
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """The body of POST /detokenize."""

    model: Name | None = Field(default=None, description="Default: the served model.")
    tokens: list[TokenId] = Field(fail_fast=True)


class Tokens(BaseModel):
    """The answer to POST /tokenize. `token_strs`: each token as text, where that was asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """The answer to POST /detokenize."""

    prompt: str


def parse_tokenize_request(body: bytes) -> tuple[TokenizeRequest, Conversation | None]:
    """Read a request body, and the conversation that it may hold. Raises BadRequestError with `param`."""
    fields = drop_inert(parse_object(body), INERT)
    request = read(TokenizeRequest, fields, {})
    if (request.prompt is None) == (request.messages is None):
        raise BadRequestError("either prompt or messages must be given", param="prompt")
    if request.messages is None:
        if request.tools:
            raise BadRequestError("tools go with messages", param="tools")
        return request, None
    if request.add_special_tokens:
        raise BadRequestError("a chat template adds them by itself", param="add_special_tokens")
    return request, _chat(fields).to_conversation()


def parse_detokenize_request(body: bytes) -> DetokenizeRequest:
    """Read a request body. Raises BadRequestError with `param`."""
    return read(DetokenizeRequest, drop_inert(parse_object(body), {}), {})


def _chat(fields: dict[str, Any]) -> ChatCompletionRequest:
    kept: dict[str, Any] = {name: fields[name] for name in ("messages", "tools") if name in fields}
    return read_chat_request({**kept, "model": "any"})
