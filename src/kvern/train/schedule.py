"""Learning rate and batch size by tokens trained: pure functions, so that a resumed run continues exactly.

    rate:   0 -> peak in warmup_steps;  peak to constant_tokens;  cosine to low over decay_tokens;
            low for low_tokens;  last
    batch:  first -> full, linearly over ramp_tokens, in multiples of `multiple`

The defaults are DeepSeek-V3's run over 14.8T tokens; a shorter run gives its own numbers. The report says that the
batch grows "gradually"; linearly is our reading. Source: DeepSeek-V3 technical report, section 4.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvern.errors import ConfigError


@dataclass(frozen=True)
class LearningRate:
    """Rates, and how many steps or tokens each part lasts."""

    peak: float = 2.2e-4
    low: float = 2.2e-5
    last: float = 7.3e-6
    warmup_steps: int = 2000
    constant_tokens: int = 10_000_000_000_000
    decay_tokens: int = 4_300_000_000_000
    low_tokens: int = 333_000_000_000

    def __post_init__(self) -> None:
        if not self.peak >= self.low >= self.last >= 0:
            raise ConfigError(f"learning rates must fall: peak {self.peak}, low {self.low}, last {self.last}")
        if min(self.warmup_steps, self.constant_tokens, self.decay_tokens, self.low_tokens) < 0:
            raise ConfigError("a part of the learning rate's schedule has a negative length")

    def at(self, step: int, tokens: int) -> float:
        """The rate of step number `step`, the first being 0, before which `tokens` were trained."""
        return self._by_tokens(tokens) * min(1.0, (step + 1) / max(1, self.warmup_steps))

    def _by_tokens(self, tokens: int) -> float:
        decayed = tokens - self.constant_tokens
        if decayed < 0:
            return self.peak
        if decayed < self.decay_tokens:
            share = (1 + math.cos(math.pi * decayed / self.decay_tokens)) / 2
            return self.low + (self.peak - self.low) * share
        return self.low if decayed < self.decay_tokens + self.low_tokens else self.last


@dataclass(frozen=True)
class BatchSize:
    """Sequences a step; `multiple` is what ranks and micro-batches need, and divides both ends."""

    first: int = 3072
    full: int = 15360
    ramp_tokens: int = 469_000_000_000
    multiple: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.first <= self.full and self.multiple > 0 and self.ramp_tokens >= 0):
            raise ConfigError(f"impossible batch: from {self.first} to {self.full} in {self.multiple}s")
        if self.first % self.multiple or self.full % self.multiple:
            raise ConfigError(
                f"batches of {self.first} and {self.full} sequences are no multiples of {self.multiple}",
                hint="that is micro-batch times data-parallel ranks",
            )

    def at(self, tokens: int) -> int:
        """Sequences of the step before which `tokens` were trained."""
        if tokens >= self.ramp_tokens:
            return self.full
        grown = (self.full - self.first) * tokens // self.ramp_tokens
        return self.first + grown // self.multiple * self.multiple
