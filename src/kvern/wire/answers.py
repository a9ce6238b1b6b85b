"""What answers of both dialects share: usage, models, the one envelope of errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel

from kvern.errors import KvernError


class PromptTokensDetails(BaseModel):
    """OpenAI's place for the tokens that the prefix cache held."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """OpenAI's place for the tokens that the model thought in; they count as completion tokens."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens of a request. The last two are DeepSeek's names; together they are prompt_tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int, reasoning_tokens: int = 0) -> Usage:
        """Build from the counts."""
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
            completion_tokens_details=CompletionTokensDetails(reasoning_tokens=reasoning_tokens),
            prompt_cache_hit_tokens=cached_tokens,
            prompt_cache_miss_tokens=prompt_tokens - cached_tokens,
        )


class Capabilities(BaseModel):
    """What the served model can do."""

    chat: bool
    completions: bool = True
    fill_in_the_middle: bool
    logprobs: bool = True
    prefix_caching: bool
    embeddings: bool = False
    tools: bool


class Model(BaseModel):
    """A served model. `max_model_len` (vLLM's name) and `context_length`: prompt and answer together, in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["kvern"] = "kvern"
    max_model_len: int
    context_length: int
    capabilities: Capabilities


class ModelList(BaseModel):
    """The answer to GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """What went wrong; `param` is the field's path."""

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
    message = sendable(f"{error.message} ({error.hint})" if error.hint else error.message)
    param = None if error.param is None else sendable(error.param)
    return ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=error.code))


def sendable(text: str) -> str:
    """Messages quote what was sent, and that may hold half a surrogate pair."""
    return text.encode(errors="backslashreplace").decode()
