"""The fields that both dialects of a request share, with their types and limits.

Read strictly: no coercion ("1" is no number) and nothing unknown. Limits that are checked here show in /openapi.json.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag

from kvern.text.options import (
    MAX_BIASES,
    MAX_LOGPROBS,
    MAX_STOP_IDS,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    SamplingOptions,
)

TAGS = ("(string)", "(list)", "(strings)", "(ids)", "(id lists)", "(object)")
STRING, LIST, STRINGS, IDS, ID_LISTS, OBJECT = TAGS
"""The forms of fields that have several; they appear in the paths of pydantic's errors."""

MAX_CHOICES = 128
"""Choices of one request (`n`, times the prompts)."""


def check_unicode(text: str) -> str:
    """Refuse lone surrogates: JSON can spell them, UTF-8 cannot."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half of a surrogate pair, which is no character")
    return text


MAX_DEPTH = 64
"""Of nested JSON in a request; schemas of tools stay far below."""


def check_json(value: Any, depth: int = 0) -> Any:
    """Refuse text that is none anywhere in free JSON, and nesting that nobody means."""
    if depth > MAX_DEPTH:
        raise ValueError(f"is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        check_unicode(value)
    elif isinstance(value, dict):
        for name, part in value.items():
            check_unicode(name)
            check_json(part, depth + 1)
    elif isinstance(value, list):
        for part in value:
            check_json(part, depth + 1)
    return value


Text = Annotated[str, AfterValidator(check_unicode)]
JSONObject = Annotated[dict[str, Any], AfterValidator(check_json)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
StopString = Annotated[Text, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
IdAsText = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
RECOMMENDED = "Default: what the checkpoint recommends, else no restriction."


def string_or_list(value: Any) -> str:
    """The tag of a union of text and list."""
    return LIST if isinstance(value, list) else STRING


def string_or_object(value: Any) -> str:
    """The tag of a union of text and object."""
    return STRING if isinstance(value, str) else OBJECT


StopOrStops = Annotated[
    Annotated[StopString, Tag(STRING)] | Annotated[list[StopString], Field(max_length=MAX_STOPS), Tag(LIST)],
    Discriminator(string_or_list),
]


class Strict(BaseModel):
    """A part of a request: unknown fields and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Strict):
    """`include_usage`: one more chunk, without choices, that carries the usage."""

    include_usage: bool = False
    include_obfuscation: bool | None = Field(default=None, json_schema_extra={"enum": [False, None]})


class SamplingFields(Strict):
    """How to sample and when to end: OpenAI's fields, then vLLM's extensions under vLLM's names."""

    model: Name
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(
        default=None, ge=0, le=2, allow_inf_nan=False, description="0 is greedy. Default: the checkpoint's, else 1."
    )
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False, description=RECOMMENDED)
    frequency_penalty: float = Field(default=0, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: float = Field(default=0, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: dict[IdAsText, Bias] | None = Field(default=None, max_length=MAX_BIASES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES, description="Choices; with a seed, choice i uses seed + i.")
    stop: StopOrStops | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Name | None = Field(default=None, description="The caller's own label; it changes nothing in the answer.")
    top_k: int | None = Field(default=None, ge=0, lt=2**31, description=f"0 is off. {RECOMMENDED}")
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False, description=RECOMMENDED)
    repetition_penalty: float = Field(default=1, ge=0.01, le=100, allow_inf_nan=False)
    min_tokens: int = Field(default=0, ge=0, lt=2**31)
    stop_token_ids: list[TokenId] = Field(default=[], max_length=MAX_STOP_IDS)
    ignore_eos: bool = False
    priority: int = Field(default=0, ge=-(2**31), lt=2**31, description="Lower goes first.")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self, max_tokens: int | None, **more: Any) -> SamplingOptions:
        """The sampling options, as the request path reads them."""
        return SamplingOptions(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            min_tokens=self.min_tokens,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=float(self.presence_penalty),
            frequency_penalty=float(self.frequency_penalty),
            repetition_penalty=float(self.repetition_penalty),
            logit_bias=tuple((int(token), float(bias)) for token, bias in (self.logit_bias or {}).items()),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            **more,
        )
