"""OpenAI's older Completions: a prompt of text or ids is continued, or the gap before `suffix` is filled.

`logprobs` has the older shape: parallel lists. A token that is no whole character is named by its bytes
(`bytes:\\xe4\\xbd`), so that names stay distinct. With `echo` the prompt comes first, in the text and in the lists; its
first token has no log-probability (null), and `max_tokens: 0` asks for the prompt alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from kvern.errors import BadRequestError
from kvern.text.messages import FinishReason, ScoredToken, TokenScore
from kvern.text.options import SamplingOptions
from kvern.wire.answers import Usage
from kvern.wire.chat import LEAST_LOGPROB
from kvern.wire.fields import (
    ID_LISTS,
    IDS,
    MAX_CHOICES,
    STRING,
    STRINGS,
    Logprobs,
    SamplingFields,
    StreamOptions,
    Text,
    TokenId,
)
from kvern.wire.reading import Inert, drop_inert, parse_object, validate
from kvern.wire.structured import GuidedFields, StructuredOutputs

DEFAULT_MAX_TOKENS = 16
"""OpenAI's own for this route."""

NOT_SUPPORTED_YET: Inert = {"best_of": (1,), "suffix": ("",)}
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _kind(value: Any) -> str:
    """Which of the four forms a prompt has; what fits none is read as the nearest, and refused there."""
    if not isinstance(value, list):
        return STRING
    if value and isinstance(value[0], list):
        return ID_LISTS
    return IDS if value and isinstance(value[0], int | float) else STRINGS


Prompt = Annotated[
    Annotated[Text, Tag(STRING)]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True), Tag(STRINGS)]
    | Annotated[Ids, Tag(IDS)]
    | Annotated[list[Ids], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True), Tag(ID_LISTS)],
    Discriminator(_kind),
]


class CompletionRequest(SamplingFields, GuidedFields):
    """The body of POST /v1/completions."""

    prompt: Prompt
    max_tokens: int | None = Field(default=None, ge=0, description=f"Default: {DEFAULT_MAX_TOKENS}. 0 goes with echo.")
    suffix: Text | None = Field(default=None, description="What follows the gap to fill; the prompt is one text then.")
    echo: bool = False
    logprobs: Logprobs | None = Field(default=None, description="The token's, and those of this many best.")
    allow_special_tokens: bool = Field(
        default=False, description="Read strings like <|im_end|> in text prompts as the tokens that they name."
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several, as text or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [list(self.prompt)]
        return list(self.prompt)

    def to_options(self) -> SamplingOptions:
        """The sampling options, as the request path reads them."""
        limit = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        scored = self.echo and (self.logprobs is not None or limit == 0)
        return self.options(limit, logprobs=(self.logprobs or 0) if scored else self.logprobs, prompt_logprobs=scored)


class CompletionLogprobs(BaseModel):
    """Parallel lists, one entry a token. `text_offset` counts characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    @classmethod
    def of(cls, scores: Sequence[ScoredToken], offset: int) -> CompletionLogprobs:
        """Build from scored tokens; `offset` is where the text that they count from begins."""
        return cls(
            tokens=[_name(one) for one in scores],
            token_logprobs=[None if one.logprob is None else max(one.logprob, LEAST_LOGPROB) for one in scores],
            top_logprobs=[_top(one) for one in scores],
            text_offset=[offset + one.offset for one in scores],
        )


class CompletionChoice(BaseModel):
    """One continuation. `index` counts the choices of the first prompt, then those of the next."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """The answer, whole or (with finish_reason null) a chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Read a request body. Raises BadRequestError with `param` for everything that is not exactly such a request."""
    fields = parse_object(body)
    if fields.get("suffix"):
        fields = {**drop_inert({**fields, "suffix": None}, NOT_SUPPORTED_YET), "suffix": fields["suffix"]}
    else:
        fields = drop_inert(fields, NOT_SUPPORTED_YET)
    request = validate(
        CompletionRequest, fields, {"stream_options": StreamOptions, "structured_outputs": StructuredOutputs}
    )
    request.guided_format()
    if request.max_tokens == 0 and not request.echo:
        raise BadRequestError("max_tokens 0 needs echo: true", param="max_tokens")
    if len(request.prompts) * request.n > MAX_CHOICES:
        raise BadRequestError(
            f"{len(request.prompts)} prompts with n {request.n} are more than {MAX_CHOICES} choices", param="n"
        )
    if request.suffix is not None:
        _check_suffix(request)
    return request


def _check_suffix(request: CompletionRequest) -> None:
    if len(request.prompts) != 1 or not isinstance(request.prompts[0], str):
        raise BadRequestError("suffix needs a prompt that is one text", param="suffix")
    if request.echo:
        raise BadRequestError("echo and suffix exclude each other", param="echo")
    if request.allow_special_tokens:
        raise BadRequestError("suffix and allow_special_tokens exclude each other", param="allow_special_tokens")


def _name(score: TokenScore) -> str:
    try:
        return score.raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in score.raw)


def _top(score: ScoredToken) -> dict[str, float] | None:
    """The best ones, and the token itself whether it is among them or not."""
    if score.logprob is None:
        return None
    return {_name(one): max(one.logprob or 0.0, LEAST_LOGPROB) for one in (*score.top, score)}
