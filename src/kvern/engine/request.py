"""A request inside the engine, and the updates that leave it.

A request has no phase. It has tokens (the prompt, then what was drawn) and the number of them whose latents are in the
cache; the rest is still to compute. A prompt, a chunk of one, a prefix hit, a preempted request that starts again and a
single decoded token differ only in how many that is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kvern.engine.grammar import Matcher
from kvern.engine.params import SamplingParams
from kvern.errors import KvernError

BACKGROUND = 2**30
"""The priority from which on a request gives way to all others."""

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probability of a token, and (id, log-probability) of the best ones, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Update:
    """What one step did for one request. The last update of a request, and only that, has `finish`.

    tokens: the new ids, a stop id included as the last; a grammar ends an answer without one. cached_tokens (prompt
    tokens found in the prefix cache) and prompt_logprobs (one a prompt token, None for the first) are set in the first
    update with a token, and so is started: when the request first left the queue, in seconds of time.monotonic.
    """

    request_id: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    error: KvernError | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    started: float | None = None


@dataclass(eq=False)
class Request:
    """The engine's own record of a request. `priority`: lower goes first; `arrival` orders requests of one priority."""

    id: int
    params: SamplingParams
    prompt_length: int
    tokens: list[int]
    priority: int
    arrival: int
    salt: bytes
    seed: int
    limit: int
    """Length of prompt and answer at which the request ends."""

    computed: int = 0
    """Tokens whose latents are in the cache."""

    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hash of each full block of `tokens`, as far as it was needed."""

    looked_up: bool = False
    """Whether its prefix was loaded from the disk once; it is not loaded again after a preemption."""

    spilled: int = 0
    """Full blocks that were offered to the disk."""

    cached_tokens: int | None = None
    """Prompt tokens that others had computed when the request first ran."""

    started: float | None = None
    """When it first left the queue, time.monotonic."""

    reported: bool = False
    matcher: Matcher | None = None
    """The state of its grammar, where it has one: at the last of `tokens`."""

    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """Tokens still to compute."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def decodes(self) -> bool:
        """Whether only the token drawn last is still to compute."""
        return self.generated > 0 and self.pending == 1

    @property
    def order(self) -> tuple[int, int]:
        """Smaller runs first and is preempted last."""
        return self.priority, self.arrival
