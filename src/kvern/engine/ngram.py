"""Prompt lookup: the last tokens occurred before, so what followed them there may follow again.

    candidates = places in prompt and answer that follow the last two tokens, the latest first, a few of them
    the one whose preceding tokens agree longest with the last tokens wins; its continuation is the draft

Code that is edited is mostly copied, so the place where the last draft came from is a candidate too, and so are the
places around it: after a renamed symbol one equal token is enough to find back. Such a place counts `NEARBY` tokens
more. A token costs one dictionary entry and one number of a chain (as in LZ77), a proposal a bounded number of
comparisons: nothing is ever scanned again. It gives up places behind the first few of a chain.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

CANDIDATES = 8
"""Places of a chain that are compared."""

LONGEST = 16
"""Tokens up to which two places are compared."""

NEARBY = 4
"""What it is worth, in equal tokens, that a place lies near where the last right draft came from."""

BEHIND, AHEAD = 4, 24
"""Tokens around the end of the last right draft that count as near it."""


@dataclass(frozen=True)
class Proposal:
    """Tokens that may come next. matched: how many tokens agree before them; source: where they come from."""

    tokens: tuple[int, ...]
    matched: int
    source: int


class NgramDrafter:
    """Proposes continuations of `tokens`, a list that its owner only appends to."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._latest: dict[int, int] = {}
        """Two tokens, as one number, to the latest place that follows them."""
        self._earlier = array("q", (0, 0))
        """For each place the one before it with the same two tokens; 0: none."""
        self._cursor: int | None = None
        self._lost = 0

    def propose(self, count: int) -> Proposal | None:
        """Up to `count` tokens that may come next; None where nothing occurred before."""
        tokens = self._tokens
        self._index(len(tokens))
        matched, _, source = max(self._matches(), default=(0, 0, 0))
        if matched < 2:
            return None
        drafts: list[int] = []
        for place in range(source, source + count):
            drafts.append(tokens[place] if place < len(tokens) else drafts[place - len(tokens)])
        return Proposal(tuple(drafts), matched, source)

    def settle(self, proposal: Proposal | None, right: int, emitted: int) -> None:
        """Of a proposal `right` tokens were right, and `emitted` tokens came."""
        if proposal is not None and right:
            self._cursor, self._lost = proposal.source + emitted, 0
        elif self._cursor is not None:
            self._cursor, self._lost = self._cursor + emitted, self._lost + emitted
            if self._lost > AHEAD:
                self._cursor = None

    def _index(self, end: int) -> None:
        """Take up the places before `end`: the last of them follows the two tokens before the last."""
        tokens, latest, earlier = self._tokens, self._latest, self._earlier
        for place in range(len(earlier), end):
            pair = tokens[place - 2] << 32 | tokens[place - 1]
            earlier.append(latest.get(pair, 0))
            latest[pair] = place

    def _matches(self) -> Iterator[tuple[int, int, int]]:
        """(equal tokens before it, rank among equals, place) of candidates; near the last source they count more."""
        tokens, end = self._tokens, len(self._tokens)
        if end < 2:
            return
        place = self._latest.get(tokens[end - 2] << 32 | tokens[end - 1], 0)
        for _ in range(CANDIDATES):
            if not place:
                break
            yield self._equal(place), place - end, place
            place = self._earlier[place]
        if self._cursor is not None:
            for near in self._near(self._cursor):
                yield self._equal(near) + NEARBY, -abs(near - self._cursor), near

    def _near(self, cursor: int) -> Iterable[int]:
        """Places around `cursor` that follow a token like the last; `cursor` alone if it is one."""
        tokens, last, end = self._tokens, self._tokens[-1], len(self._tokens)
        if cursor < end and tokens[cursor - 1] == last:
            return [cursor]
        window = range(max(1, cursor - BEHIND), min(end, cursor + AHEAD))
        return [place for place in window if tokens[place - 1] == last]

    def _equal(self, place: int) -> int:
        """How many tokens before `place` equal the last tokens."""
        tokens, end = self._tokens, len(self._tokens)
        most = min(LONGEST, place)
        return next((i for i in range(most) if tokens[place - 1 - i] != tokens[end - 1 - i]), most)
