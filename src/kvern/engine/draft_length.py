"""How many tokens to draft: as many as raise the tokens that a step yields for what it costs.

    max over k of (tokens so far + sum_{j <= k} p_1 ... p_j) / (cost(rows + k, context rows read) + k * making)

making is what it costs to make a draft: nothing for one that is looked up, else a pass of the MTP layer. p_j, the
chance that draft j is right if those before it are, is measured for each request; see `Chances`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvern.engine.step_cost import Cost

FORGET = 32
"""Comparisons after which older ones count half."""

PRIOR = 3.0
"""What the first guess of a chance weighs, in comparisons."""


class Chances:
    """How often drafts of several kinds were right, of late; the last kind stands for all above it."""

    def __init__(self, guesses: Sequence[float]) -> None:
        self._right = [PRIOR * guess for guess in guesses]
        self._seen = [PRIOR] * len(guesses)

    def of(self, kind: int) -> float:
        """The chance of a draft of a kind."""
        kind = min(kind, len(self._seen) - 1)
        return self._right[kind] / self._seen[kind]

    def learn(self, kind: int, right: bool) -> None:
        """One comparison."""
        kind = min(kind, len(self._seen) - 1)
        if self._seen[kind] >= FORGET:
            self._right[kind] /= 2
            self._seen[kind] /= 2
        self._right[kind] += right
        self._seen[kind] += 1


@dataclass(frozen=True)
class Load:
    """What a step does so far: rows, context rows they look at, tokens it is expected to yield.

    making: what it costs to make its drafts, in the unit of `Cost`.
    """

    rows: int
    attended: int
    tokens: float
    making: float = 0.0

    def rate(self, cost: Cost) -> float:
        """Tokens for what it costs."""
        return self.tokens / (cost(self.rows, self.attended) + self.making)


def best_length(
    chances: Sequence[float], load: Load, context: int, cost: Cost, making: float = 0.0
) -> tuple[int, Load]:
    """How many drafts with these chances are best (maybe none), and the step's load with them.

    context: context rows that one more row looks at. making: what making each of them costs.
    """
    best, most, rate = 0, load, load.rate(cost)
    reach, tokens = 1.0, load.tokens
    for count, chance in enumerate(chances, start=1):
        reach *= chance
        tokens += reach
        longer = Load(load.rows + count, load.attended + count * context, tokens, load.making + count * making)
        if (better := longer.rate(cost)) > rate:
            best, most, rate = count, longer, better
    return best, most
