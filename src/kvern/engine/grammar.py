"""What an answer is held to, as the engine sees it: which token ids may come next, and where the answer may end.

    ids that may be drawn = mask below vocab_limit, without stop ids; + all stop ids where the answer may end

Whoever has the text makes these objects; the engine asks one a request and tells it every token that was drawn. A
request keeps its matcher when it is preempted, as it keeps its tokens. Drafts need no way back: the matcher only
learns of tokens that were drawn, and where drafts are chosen it says how many of them could be.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Mask = NDArray[np.bool_]


class Matcher(Protocol):
    """The state of one answer."""

    @property
    def may_end(self) -> bool:
        """Whether the answer is complete as it is."""

    @property
    def is_done(self) -> bool:
        """Whether nothing may follow but the end."""

    def mask(self) -> Words:
        """The ids that may come next, [ceil(ids / 32)], bit i % 32 of word i // 32; valid until the next call.

        Raises KvernError where it cannot be told.
        """

    def allows(self, token: int) -> bool:
        """Whether this id may come next; much cheaper than the mask."""

    def fitting(self, tokens: Sequence[int]) -> int:
        """How many of these ids, from the first on, may come next one after the other."""

    def advance(self, token: int) -> None:
        """This id came. Raises KvernError where it must not, or the state grows beyond its bounds."""


class Grammar(Protocol):
    """What makes a matcher for each request."""

    def matcher(self) -> Matcher:
        """A matcher at the beginning of an answer."""


def allows(matcher: Matcher, token: int, stops: Collection[int]) -> bool:
    """Whether a token may be drawn."""
    return matcher.may_end if token in stops else matcher.allows(token)


def allowed(matcher: Matcher, stops: Collection[int], count: int) -> Mask:
    """Which of the first `count` ids may be drawn, [count]."""
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
    whole: NDArray[Any] = np.zeros(count, np.bool_)
    known = min(count, len(bits))
    whole[:known] = bits[:known]
    whole[[stop for stop in stops if stop < count]] = matcher.may_end
    return whole
