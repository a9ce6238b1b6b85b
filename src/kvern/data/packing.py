"""Documents that must not be cut, put together to rows: best fit, the longest first.

A document goes into the fullest row that still has room for it. Rows are then full but for about 1 % where most
documents are shorter than a quarter of a row. It is done once; what changes from epoch to epoch is the order of rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from kvern.data.order import order

Packed = list[NDArray[np.int64]]
"""The documents of each row."""


def best_fit(lengths: NDArray[np.int64], capacity: int, seed: int) -> Packed:
    """Rows of at most `capacity` tokens; no length may exceed it. Documents of one length take an order of the seed."""
    shuffled = order(len(lengths), seed)
    longest_first = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # the keys of with_room that hold a row, sorted
    for document in longest_first.tolist():
        length = int(lengths[document])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        rows[row].append(document)
        left = room - length
        if left:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(row)
    return [np.array(row, dtype=np.int64) for row in rows]
