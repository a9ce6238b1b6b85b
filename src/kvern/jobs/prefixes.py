"""In which order rows run: those that begin alike together, and one of them before the rest.

    sort by what the model reads first; cut where two neighbours share less than SHARED characters

The first row of a group fills the prefix cache; the others wait for its end and find their beginning computed. Groups
warm up side by side, so the slots stay full; a row that shares nothing is a group of its own. Only the first
KEY_CHARACTERS count, so the order of 50,000 rows takes some 50 MB whatever their length.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHARED = 200
KEY_CHARACTERS = 1000


@dataclass(frozen=True)
class Place:
    """Where a row stands: `rank` in the order of all, `prefix` the number of its group."""

    rank: int
    prefix: int


def key(body: Mapping[str, Any]) -> str:
    """What the model reads first of a request, as text: tools, instructions, then the conversation or the prompt."""
    parts = [body.get(name) for name in ("tools", "instructions", "messages", "input", "prompt")]
    return json.dumps([part for part in parts if part is not None], ensure_ascii=False)[:KEY_CHARACTERS]


def arrange(keys: Sequence[str]) -> list[Place]:
    """The place of each row, by its key. Rows of one key keep the order of the input."""
    order = sorted(range(len(keys)), key=lambda index: (keys[index], index))
    places: list[Place | None] = [None] * len(keys)
    prefix = -1
    for rank, index in enumerate(order):
        if rank == 0 or not _alike(keys[order[rank - 1]], keys[index]):
            prefix += 1
        places[index] = Place(rank, prefix)
    return [place for place in places if place is not None]


def _alike(one: str, other: str) -> bool:
    return len(one) >= SHARED and one[:SHARED] == other[:SHARED]


class Turns:
    """Hands rows out: those of warm groups first, else the first row of the next group.

    `rows` are (line, prefix) in the order of ranks. After `take` of a group's first row, the others come once `done`
    was called for it.
    """

    def __init__(self, rows: Iterable[tuple[int, int]]) -> None:
        self._cold: deque[deque[int]] = deque()
        self._warm: deque[deque[int]] = deque()
        self._warming: dict[int, deque[int]] = {}
        last: int | None = None
        for line, prefix in rows:
            if prefix != last:
                self._cold.append(deque())
                last = prefix
            self._cold[-1].append(line)

    def take(self) -> int | None:
        """The line to run next; None where each that is left waits for its group's first."""
        if self._warm:
            group = self._warm[0]
            line = group.popleft()
            if not group:
                self._warm.popleft()
            return line
        if not self._cold:
            return None
        group = self._cold.popleft()
        line = group.popleft()
        if group:
            self._warming[line] = group
        return line

    def done(self, line: int) -> None:
        """A row has ended: the rest of its group may run, if it was the first."""
        if (group := self._warming.pop(line, None)) is not None:
            self._warm.append(group)

    @property
    def empty(self) -> bool:
        """Whether every row was handed out."""
        return not (self._cold or self._warm or self._warming)
