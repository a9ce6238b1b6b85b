"""How an engine is dimensioned, and what it counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from kvern.errors import ConfigError

Drafts = Literal["auto", "off", "ngram", "mtp"]
CacheDtype = Literal["auto", "fp8"]


@dataclass(frozen=True)
class EngineSettings:
    """max_context: tokens of prompt and answer (None: the model's). cache_tokens: room of the cache in tokens (None: up
    to eight full contexts, within half the free memory). step_tokens: tokens computed in one step. max_running and
    max_waiting: requests that share the steps, and that queue. cache_dtype: the activations' (auto) or fp8, about half
    of BF16's bytes at a small cost in quality (docs/quantization.md). check_every_step: prove after each step that the
    blocks' books balance. drafts: where guessed tokens come from (auto: n-grams, and the MTP layer where the model
    has one); draft_tokens: most of them for a request in one step. cache_dir: a folder where full blocks outlive the
    process, in at most cache_disk_bytes (None: nothing is kept).
    """

    max_context: int | None = None
    cache_tokens: int | None = None
    cache_dtype: CacheDtype = "auto"
    block_size: int = 16
    step_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 256
    prefix_caching: bool = True
    check_every_step: bool = False
    drafts: Drafts = "off"
    draft_tokens: int = 16
    cache_dir: Path | None = None
    cache_disk_bytes: int = 16 * 2**30

    def __post_init__(self) -> None:
        if self.cache_dtype not in get_args(CacheDtype):
            raise ConfigError(
                f"cache_dtype must be one of {', '.join(get_args(CacheDtype))}, not {self.cache_dtype!r}",
                param="cache_dtype",
            )
        for name in ("block_size", "step_tokens", "max_running", "max_waiting", "draft_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_running > self.step_tokens:
            raise ConfigError(
                f"max_running {self.max_running} exceeds step_tokens {self.step_tokens}: some would never run"
            )
        for name in ("max_context", "cache_tokens"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ConfigError(f"{name} must be at least 2, not {value}")
        if self.cache_dir is not None and not self.prefix_caching:
            raise ConfigError("cache_dir keeps prefixes, and prefix_caching is off", param="cache_dir")


@dataclass(frozen=True)
class DiskStats:
    """What the prefix cache on disk holds and did. queries and hits count tokens, evicted and corrupt blocks.

    failures: times that writing failed.
    """

    blocks: int
    bytes: int
    queries: int
    hits: int
    read_bytes: int
    written_bytes: int
    evicted: int
    corrupt: int
    failures: int


@dataclass(frozen=True)
class EngineStats:
    """A snapshot. Counters count from the start; prefix_* and the *_tokens count tokens.

    drafts: times that drafts of a request were verified; accepted_by_position: of the first, second, ... draft.
    """

    running: int
    waiting: int
    cache_blocks: int
    cache_blocks_used: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    finished: dict[str, int] = field(default_factory=dict)
    drafts: int = 0
    draft_tokens: int = 0
    accepted_by_position: tuple[int, ...] = ()
    disk: DiskStats | None = None

    @property
    def accepted_draft_tokens(self) -> int:
        """Drafts that became tokens of an answer."""
        return sum(self.accepted_by_position)


@dataclass
class Counts:
    """The counters behind EngineStats that the engine itself moves."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    finished: Counter[str] = field(default_factory=Counter)
