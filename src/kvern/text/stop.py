"""Stop strings over text that arrives in pieces.

Of several stop strings the one that is complete first wins; of those complete at the same character, the longest. That
rule looks at characters only, so the answer does not depend on how the text was cut into pieces. Text that could still
become a stop string is held back: at most the length of the longest one, minus one character.
"""

from __future__ import annotations

from collections.abc import Iterable


def held_back(text: str, needles: Iterable[str]) -> int:
    """Return the length of the longest end of `text` that is a proper beginning of one of `needles`."""
    longest = 0
    for needle in needles:
        for length in range(min(len(needle) - 1, len(text)), longest, -1):
            if text.endswith(needle[:length]):
                longest = length
                break
    return longest


class StopMatcher:
    """Cuts a stream of text at the first stop string. `matched`: the one that was seen; feed nothing after it."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._pending = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Add a piece; return the text that is now certain to lie before any stop string."""
        self._pending += text
        match = self._first_match()
        if match is not None:
            start, self.matched = match
            return self._take(start)
        return self._take(len(self._pending) - held_back(self._pending, self._stops))

    def finish(self) -> str:
        """Return what was held back: the stream has ended and no stop string came of it."""
        return "" if self.matched is not None else self._take(len(self._pending))

    def _first_match(self) -> tuple[int, str] | None:
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := self._pending.find(stop)) >= 0]
        return min(found)[1:] if found else None

    def _take(self, length: int) -> str:
        text, self._pending = self._pending[:length], self._pending[length:]
        return text
