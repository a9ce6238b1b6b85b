"""How an answer is sampled and when it ends, as a caller says it; checked by name and range in one place.

None means "not said": `llm` fills it from the checkpoint's generation_config.json. Temperature, top_p, top_k and min_p
are filled; penalties are not, because they would change what is computed at temperature 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

from kvern.errors import BadRequestError

MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
MAX_STOP_IDS = 128
MAX_BIASES = 1024
MAX_LOGPROBS = 20


TemperatureMapping: TypeAlias = Literal["none", "deepseek_api"]


def mapped_temperature(temperature: float, mapping: TemperatureMapping) -> float:
    """The temperature to sample with, for one that a caller asked for.

    deepseek_api: as DeepSeek's own service does for V3-0324 (its model card), T x 0.3 up to 1, T - 0.7 above.
    """
    if mapping == "none":
        return temperature
    return temperature * 0.3 if temperature <= 1 else temperature - 0.7


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens, and when to end.

    max_tokens None: up to the end of the context; 0 goes with prompt_logprobs. min_tokens: no end before. temperature
    0.0 is greedy. top_k 0: off. seed None: a new one for every request. logit_bias: (id, -100..100). stop: strings that
    end the answer and do not show; stop_token_ids likewise; ignore_eos: the model's own end does not count. logprobs
    None: none, k: the token's and those of the k best; prompt_logprobs: also those of the prompt's tokens.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False

    @classmethod
    def of(cls, **given: Any) -> SamplingOptions:
        """Build from keyword arguments; `stop` may be one string, `logit_bias` a mapping. Raises BadRequestError."""
        known = {field.name for field in fields(cls)}
        for name in given:
            if name not in known:
                raise BadRequestError(
                    f"unknown sampling option {name!r}", hint=f"known: {', '.join(sorted(known))}", param=name
                )
        stop, bias = given.pop("stop", None) or (), given.pop("logit_bias", None) or ()
        options = replace(
            cls(**{name: value for name, value in given.items() if value is not None}),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            logit_bias=tuple(bias.items() if isinstance(bias, Mapping) else bias),
            stop_token_ids=tuple(given.get("stop_token_ids") or ()),
        )
        options.check()
        return options

    def check(self) -> None:
        """Raise BadRequestError, naming the field, where a value is out of its range."""
        for name, allowed, says in RANGES:
            value = getattr(self, name)
            if value is not None and not allowed(value):
                raise BadRequestError(f"{name} must be {says}, not {value}", param=name)
        if self.max_tokens == 0 and not self.prompt_logprobs:
            raise BadRequestError("max_tokens must be at least 1, not 0", param="max_tokens")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise BadRequestError(
                f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}", param="min_tokens"
            )
        if any(not text for text in self.stop):
            raise BadRequestError("a stop string must not be empty", param="stop")
        _check_count("stop", self.stop, MAX_STOPS)
        _check_count("stop_token_ids", self.stop_token_ids, MAX_STOP_IDS)
        _check_count("logit_bias", self.logit_bias, MAX_BIASES)
        if any(not -100 <= bias <= 100 for _, bias in self.logit_bias):
            raise BadRequestError("a logit bias must be between -100 and 100", param="logit_bias")

    def changes(self) -> dict[str, Any]:
        """The options that differ from the defaults, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}


RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("max_tokens", lambda value: value >= 0, "at least 1"),
    ("min_tokens", lambda value: value >= 0, "at least 0"),
    ("temperature", lambda value: 0 <= value <= 2, "between 0 and 2"),
    ("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1"),
    ("top_k", lambda value: 0 <= value < 2**31, "at least 0"),
    ("min_p", lambda value: 0 <= value <= 1, "between 0 and 1"),
    ("presence_penalty", lambda value: -2 <= value <= 2, "between -2 and 2"),
    ("frequency_penalty", lambda value: -2 <= value <= 2, "between -2 and 2"),
    ("repetition_penalty", lambda value: 0.01 <= value <= 100, "between 0.01 and 100"),
    ("logprobs", lambda value: 0 <= value <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
    ("seed", lambda value: -(2**63) <= value < 2**63, "a 64-bit integer"),
)


def _check_count(name: str, values: Iterable[Any], most: int) -> None:
    count = len(tuple(values))
    if count > most:
        raise BadRequestError(f"{name} holds {count} entries, and at most {most} are taken", param=name)
